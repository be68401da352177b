"""The solver: budgets, the bit-width program, and the plan."""
