"""Multi-layer perceptrons of which each token takes a part."""
