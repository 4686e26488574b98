"""Calibration: from samples to ranges, blocks and integers.

Depends on torch and core; a kernel can never change a search.
"""
