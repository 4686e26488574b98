"""Calibration: from samples to ranges, blocks and integers. It never sees a kernel."""
