"""Techniques that make inference cheaper."""
