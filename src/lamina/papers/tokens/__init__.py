"""Which tokens carry something, and through which blocks."""
