"""Fitting a model to images of another domain, without their labels."""
