"""Loss terms: reconstruction, sparsity, coherence in time and space."""
