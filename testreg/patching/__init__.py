"""How a register rides along."""
