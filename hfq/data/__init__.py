"""A dataset's rows, and the examples that a task makes of them."""
