"""What to keep: scores, selections, merges, budgets and traces as pure functions. Knows no model."""
