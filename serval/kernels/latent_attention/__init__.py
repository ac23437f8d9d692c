"""See reference.py."""
