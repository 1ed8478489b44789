"""Sparse autoencoders: recipe (`config`), sparsifiers, normalization, sparse products, `model`, files on disk.

Nothing is imported here, so that the command line can read recipes without loading torch.
"""
