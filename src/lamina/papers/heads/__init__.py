"""Attention heads and maps: what they move, copy and pass on, and what of it the answer needs."""
