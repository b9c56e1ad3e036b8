"""Changes of weights and structure."""
