"""Techniques that change what a convolutional network is made of."""
