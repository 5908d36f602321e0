"""Techniques that need fewer or cheaper images."""
