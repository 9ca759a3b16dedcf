"""Recipes and cells of a sweep, the workers that run them, and their results."""
