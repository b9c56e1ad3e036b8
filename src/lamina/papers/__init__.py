"""One small file per paper: the piece it invents, and the recipe rows that name the rest."""
