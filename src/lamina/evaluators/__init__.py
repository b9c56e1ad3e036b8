"""Ways to measure what a model does."""
