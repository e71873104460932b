"""Running int8 checkpoints: kernels, the modules that call them, and loading through transformers."""
