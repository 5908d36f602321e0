"""Tuning a small part of a model."""
