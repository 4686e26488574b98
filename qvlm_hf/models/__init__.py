"""Which modules of which model family are quantized: data, and the one walk that reads it."""
