"""Tasks that a model is asked to do: one number per item, for the dense and the thinned model alike."""
