"""Width: which channels of a network's maps carry energy."""
