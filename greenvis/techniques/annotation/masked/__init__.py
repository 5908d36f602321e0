"""Pretraining from images alone, by what is masked."""
