"""Pretraining from models that exist."""
