"""Weights of linear maps that can be zero, and how many of each map."""
