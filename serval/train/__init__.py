"""Training: recipes, the loop, checkpoints, reports."""
