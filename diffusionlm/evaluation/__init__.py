"""Evaluation of models: tasks, baselines to compare with, and the tables that show them."""
