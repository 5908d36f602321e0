"""Classes that are known by name alone."""
