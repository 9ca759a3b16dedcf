"""Text and dialogues into prepared datasets, and these into batches."""
