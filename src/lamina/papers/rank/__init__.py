"""Ranks that weights need: spectra of linear maps."""
