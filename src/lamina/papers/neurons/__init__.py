"""Neurons of MLPs: what they say, and how many of them are distinct."""
