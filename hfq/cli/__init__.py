"""The `hfq` command: from flags to recipes, and from what happens to messages and exit codes."""


def main() -> None:
    """Run the command that the arguments name."""
    from .commands import main as run

    run()
