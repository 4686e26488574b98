"""Schemes, grids, packing and the table of model families. Depends on torch alone."""
