"""`optimum-cli hfq …`: the whole of hfq's command line under optimum's.

optimum finds commands by their place, `optimum/commands/register/`: a wheel, and an editable one too, puts a copy of
this file there (`force-include` in pyproject.toml).
"""

import sys
from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class HfqCommand(BaseOptimumCLICommand):
    """Hands everything behind `hfq` on, so that flags, help, output and exit codes are those of `hfq`."""

    COMMAND = CommandInfo(name="hfq", help="Quantize encoders to INT8 for CPUs: `optimum-cli hfq quantize --help`.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.prefix_chars = (
            ""  # or argparse would answer --help and refuse --version itself: REMAINDER begins at a word
        )
        parser.add_argument("arguments", nargs=REMAINDER, help="as `hfq` takes them; try `quantize --help`")

    def run(self) -> None:
        from hfq.cli import main  # not relative: what runs is the copy in optimum's folder

        sys.argv = ["hfq", *self.args.arguments]
        main()


REGISTER_COMMANDS = [HfqCommand]
