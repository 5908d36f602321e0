"""Learning a stream of experiences."""
