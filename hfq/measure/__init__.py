"""Score, time and memory of a model, and how two models compare."""
