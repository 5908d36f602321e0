"""Images drawn with fewer calls of a diffusion network, or with cheaper ones."""
