"""One training step: SAE and optimizer, stacked SAEs, CUDA graphs, dead-latent counts."""
