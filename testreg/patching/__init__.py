"""How registers get through a tower: what a patch puts on it, and what the tower sees of it."""
