"""Loss terms: reconstruction, sparsity, temporal and spatial coherence."""
