"""The network: the Transformer, its attention, adapters, and what its users must know of it."""
