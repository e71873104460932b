"""Quantization-aware fine-tuning, where post-training quantization misses the goal: the float model is the teacher."""
