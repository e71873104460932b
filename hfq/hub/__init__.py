"""All HTTP: the Hub's client, downloads, repositories and commits."""
