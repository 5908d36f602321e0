"""Segmentation without a mask: pretraining for pixels, and label maps of clusters."""
