"""How much the output suffers from every (group, precision)."""
