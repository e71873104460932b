"""What may run as one step, found by the flow of tensors in a forward: one file a fusion."""
