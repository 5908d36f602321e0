"""Which images an epoch shows, and how often."""
