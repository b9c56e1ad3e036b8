"""Which blocks and sublayers can go."""
