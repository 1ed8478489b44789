"""What an evaluation writes: sections, figures, tables per latent and per effect."""
