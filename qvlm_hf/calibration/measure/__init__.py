"""What is measured before the search and after it."""
