"""Fewer tokens: merged or removed on the way."""
