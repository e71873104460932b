"""Tasks whose model reads tokens."""
