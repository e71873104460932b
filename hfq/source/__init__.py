"""A checkpoint, checked before anything is loaded from it."""
