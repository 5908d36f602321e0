"""Learning from labels of which some are wrong, or of which only candidates are known."""
