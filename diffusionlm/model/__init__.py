"""The network: Transformer, attention, adapters, and the facts about a model that callers need."""
