"""What runs in a loaded model besides its quantized modules."""
