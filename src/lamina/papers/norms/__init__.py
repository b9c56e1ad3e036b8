"""Norms that lose their mean, or their divisor."""
