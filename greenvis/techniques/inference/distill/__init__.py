"""Distillation: a small student learns from large frozen teachers."""
