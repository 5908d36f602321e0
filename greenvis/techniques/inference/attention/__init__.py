"""Attention whose cost grows with the number of tokens, not with its square."""
