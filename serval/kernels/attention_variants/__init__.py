"""Attention without the need for a sink: other normalisations of the scores, sinks that are no
token, gates. `reference.py` has them over explicit logits, with their identities."""
