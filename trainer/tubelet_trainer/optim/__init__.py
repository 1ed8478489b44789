"""One optimization step: optimizer, stacked SAEs, sharded dictionaries, CUDA graphs."""
