"""Pretraining from images alone, by their views."""
