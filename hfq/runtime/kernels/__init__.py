"""Int8 matmuls, and weights in the layouts that they read."""
