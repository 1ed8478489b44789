"""A training run: loop, checkpoints, logs, stop signals, processes."""
