"""Techniques that make adapting and keeping on learning cheaper."""
