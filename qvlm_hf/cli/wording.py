"""Messages of the library in the words of the command line.

The library names an argument as `name=value` or `name=`, or, if it is of several words, in front:
`several_words: `. An option of that name takes its place. Behind "quantize with" the options of
`qvlm quantize` are meant, whichever command runs.
"""

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Mapping
from functools import cache

__all__ = ["command_arguments", "in_options", "shown_name"]

_ELSEWHERE = "quantize with "
# In quotes or brackets, or one word that is no path; nothing before a space or the end of a clause.
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[^\s,;:()/]*[^\s,;:()./](?![\w/])|(?=[\s.,;:)]|$)"


def in_options(message: str, command: str | None) -> str:
    """A message of the library, in one line, with a command's options for Python's arguments."""
    text = " ".join(message.split())
    if command is None:
        return text
    own, (first, words, rest) = command_arguments(command), text.partition(_ELSEWHERE)
    return _translate(first, own) + words + _translate(rest, command_arguments("quantize") | own)


def shown_name(action: argparse.Action) -> str:
    """The command line's name for an argument: `--option`, or the metavar of a place."""
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


@cache
def command_arguments(command: str) -> dict[str, argparse.Action]:
    """Name in Python -> argument of a command; empty if the command cannot be imported."""
    parser = argparse.ArgumentParser(add_help=False)
    try:
        importlib.import_module(f"qvlm_hf.cli.{command}").add_arguments(parser)
    except Exception:  # whoever asks has an error to tell already
        return {}
    return {action.dest: action for action in parser._actions}


def _translate(text: str, arguments: Mapping[str, argparse.Action]) -> str:
    if not text or not arguments:
        return text
    name, colon, rest = text.partition(": ")
    if name in arguments and "_" in name:  # another may be the name of a file
        text = f"{shown_name(arguments[name])}{colon}{rest}"
    pattern = rf"(?<![\w/.\"'-])({'|'.join(arguments)})=({_VALUE})"
    return re.sub(pattern, lambda found: _option(arguments[found[1]], found[2]), text)


def _option(action: argparse.Action, value: str) -> str:
    name = shown_name(action)
    if value == "" or (value == "True" and action.nargs == 0):
        return name
    if value in ("None", "False"):
        return f"{name} none" if "none" in (action.choices or ()) else f"no {name}"
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return f"{name} {value}"
    words = parsed if isinstance(parsed, list) else [parsed]
    return " ".join([name, *(shlex.quote(str(word)) for word in words)])
