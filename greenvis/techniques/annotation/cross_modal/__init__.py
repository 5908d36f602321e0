"""Learning from the texts that come with images."""
