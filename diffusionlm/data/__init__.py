"""Turn text and dialogues into prepared datasets, and read them back as batches."""
