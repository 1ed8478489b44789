"""From stores to batches: order of tokens, prefetching, pairs, mixtures of stores, held-out videos."""
