"""Sharing of models: cards that describe a checkpoint, and the Hugging Face Hub."""
