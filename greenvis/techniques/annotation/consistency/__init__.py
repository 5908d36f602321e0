"""Learning from images without labels by agreement among their views."""
