"""Sparse autoencoders: recipe (`config`), parts (`sparsifiers`, `sparse`, `normalization`), `model`, and `export`.

Nothing is imported here, so that the command line can read recipes without loading torch.
"""
