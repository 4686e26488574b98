"""What is written of a calibration: its report, and finished steps to go on from."""
