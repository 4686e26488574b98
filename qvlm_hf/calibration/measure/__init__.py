"""Measurements before the search and after it."""
