"""Cache activations of frozen video backbones, train sparse autoencoders on them, analyze what they learned."""
