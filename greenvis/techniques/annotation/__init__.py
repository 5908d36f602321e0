"""Techniques that need fewer labels."""
