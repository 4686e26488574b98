"""`optimum-cli qvlm ...` is `qvlm ...`: same commands, same options, same exit status.

optimum-cli imports every file of this folder whenever it starts, so nothing heavy is imported
before the command runs, and the words after `qvlm` are not parsed here.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

__all__ = ["REGISTER_COMMANDS", "QVLMCommand"]


class QVLMCommand(BaseOptimumCLICommand):
    """The subcommand of optimum-cli."""

    COMMAND = CommandInfo(
        name="qvlm",
        help="Q-VLM quantization of vision-language models: quantize, ask, evaluate, inspect and "
        "more.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Takes all that follows as it is, options included."""
        parser.prefix_chars = ""  # nothing is an option here, not even --help
        parser.add_argument("words", nargs=REMAINDER)

    def run(self) -> None:
        """Runs the command.

        Raises:
            SystemExit: always, with the exit status of `qvlm`.
        """
        from qvlm_hf.cli import main

        raise SystemExit(main(self.args.words))


# An iterator, so that it is taken once: where two copies of this package are on the path (a
# checkout beside an installed one), optimum-cli reads this list once per copy, and a second `qvlm`
# would be an error.
REGISTER_COMMANDS = iter([QVLMCommand])
