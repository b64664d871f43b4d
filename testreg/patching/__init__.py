"""How a register rides along: what is put on a patched tower, and what the tower sees of it."""
