"""Codes of an SAE: sparse storage, pooling per video, controls, and directions of the dictionary."""
