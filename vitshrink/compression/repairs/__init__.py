"""Repairs of a compressed model: what a bias can absorb, a residual fitted to what is left, gains and biases."""

COMPENSATIONS = ("none", "bias", "residual", "rescale", "stream")
