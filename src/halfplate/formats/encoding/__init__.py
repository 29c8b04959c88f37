"""Numbers as they are stored: packed into bits, rounded to types and codes."""
