"""Scores and a budget → steps."""
