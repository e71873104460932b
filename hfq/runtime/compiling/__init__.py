"""What `hfq.compile` does: graphs of a model's forward, compiled once and kept."""
