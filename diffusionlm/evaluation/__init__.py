"""How good a model is: baselines to compare it with, and reports."""
