"""Changes of the weights that keep the function and make it easier to quantize."""
