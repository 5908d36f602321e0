"""Training for images unlike those it is shown."""
