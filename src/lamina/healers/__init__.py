"""Ways to win back what a rewrite cost."""
