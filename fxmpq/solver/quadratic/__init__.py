"""The quadratic program: interactions between groups counted, the optimum proven."""
