"""The quantizer of Optimum, and what the build puts into Optimum's namespace."""
