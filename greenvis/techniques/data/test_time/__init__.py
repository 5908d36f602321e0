"""Fitting a model to what it is shown while it answers."""
