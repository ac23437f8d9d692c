"""Adapting a trained model: low-rank adapters, supervised fine-tuning, merging, serving."""
