"""Benchmarks for the user's own machine: single kernels and whole models, beside full precision."""
