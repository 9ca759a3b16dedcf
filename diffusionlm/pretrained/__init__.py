"""A loaded checkpoint that completes, fills in, scores and chooses texts, and ways to show how it denoises."""
