"""Scores by which bits are given to layers."""
