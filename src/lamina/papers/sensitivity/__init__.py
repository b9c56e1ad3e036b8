"""Papers that score a site by what the loss, expanded around the trained weights, says of its absence."""
