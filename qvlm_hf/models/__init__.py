"""Which modules of which model family are quantized."""
