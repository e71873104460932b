"""The `hfq` command: from flags to recipes, and from what happens to messages and exit codes."""

from .main import command, main

__all__ = ["command", "main"]
