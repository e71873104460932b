"""Post-training quantization: ranges, scales, and the algorithms that better them."""
