"""How the demo model and its data were made."""
