"""Measures of what perturbed inputs do to each layer."""
