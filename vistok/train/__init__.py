"""Training: a checked recipe, one loop that knows no model, and step objects that hold what differs."""
