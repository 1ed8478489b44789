"""From stores to batches: order of tokens, windows, prefetching, pairs, mixtures."""
