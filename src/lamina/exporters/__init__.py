"""Checkpoints that other tools load."""
