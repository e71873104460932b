"""Tasks whose model sees pixels."""
