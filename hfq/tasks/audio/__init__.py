"""Tasks whose model hears recordings."""
