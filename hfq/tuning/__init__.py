"""Finding a quantization that meets the accuracy goal: candidates, their order, the search and its log."""
