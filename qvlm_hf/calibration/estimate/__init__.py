"""What a calibration will take: time and memory, from shapes alone."""
