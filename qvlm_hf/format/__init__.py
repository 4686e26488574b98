"""What lies on disk: schemes, grids, packed bits. Needs torch alone."""
