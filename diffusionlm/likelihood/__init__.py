"""Log-likelihoods of text under a model: estimates with standard errors, perplexity, and choices between answers."""
