"""Messages of the library as the command line shows them: its options, and no argument of Python."""

import ast
import re
from inspect import signature
from pathlib import Path

import pytest

import qvlm_hf
from qvlm_hf import QVLMConfig
from qvlm_hf.cli import _COMMANDS
from qvlm_hf.cli.wording import command_arguments, in_options

PACKAGE = Path(qvlm_hf.__file__).parent
# Python's own words; `True` and `False` follow a name, so they go with it.
PYTHON = re.compile(
    r"QVLMConfig\(|\b[a-z_]+=|\b[a-z_]+\(\)|_pretrained|\btorch\.|\bdataset\[|\bNone\b"
)
HOLE = "\0"  # where a value is put in


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("quantize", "num_samples=0 must be at least 1.", "--num-samples 0 must be at least 1."),
        (
            "quantize",
            "precision_budget=1.5 must be 2 to 8.",
            "--precision-budget 1.5 must be 2 to 8.",
        ),
        (
            "quantize",
            "modules_to_not_convert: 'nose' matches no module",
            "--modules-to-not-convert: 'nose' matches no module",
        ),
        (
            "quantize",
            "give samples (dataset='my samples.jsonl')",
            "give samples (--dataset 'my samples.jsonl')",
        ),
        (
            "quantize",
            "leave it (modules_to_not_convert=['a', 'b c']).",
            "leave it (--modules-to-not-convert a 'b c').",
        ),
        (
            "quantize",
            "group_size=128 and symmetric=False: take group_size=-1",
            "--group-size 128 and no --symmetric: take --group-size -1",
        ),
        ("quantize", "use rotation=None.", "use --rotation none."),
        (
            "quantize",
            "strict=True: use more bits, or leave out dataset=.",
            "--strict: use more bits, or leave out --dataset.",
        ),
        (
            "quantize",
            "a smaller batch_size=, or more samples",
            "a smaller --batch-size, or more samples",
        ),
        ("quantize", "seed=-1 must be below 2**63.", "--seed -1 must be below 2**63."),
        (
            "quantize",
            "repo_id='a b' must be 'owner/name'",
            "--push-to-hub 'a b' must be 'owner/name'",
        ),
        ("publish", "repo_id='a b' must be 'owner/name'", "REPO 'a b' must be 'owner/name'"),
        (
            "publish",
            "create_pr=True opens one: leave out revision='dev'.",
            "--create-pr opens one: leave out --revision dev.",
        ),
        ("publish", "commit_message: holds a Hub token", "--message: holds a Hub token"),
        (
            "export",
            "quantize with symmetric=True and rotation=None.",
            "quantize with --symmetric and --rotation none.",
        ),
        ("check", "two\n lines", "two lines"),
        (None, "seed=3", "seed=3"),
    ],
)
def test_arguments_become_options(command, message, expected):
    assert in_options(message, command) == expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "quantize",
            "/data/batch_size/x.jsonl: no such file or folder (looked in /seed=3/group_size)",
        ),
        ("quantize", 'x.jsonl:3: key "num_samples" is unknown here, and "answer" is missing'),
        ("quantize", "columns num_samples and batch_size are odd"),
        ("quantize", "seed=3/data.jsonl: no such file"),
        ("quantize", "dataset: holds no samples"),  # a folder of that name
        ("quantize", "model: is quantized already"),
        ("quantize", "the dataset: has no samples"),
        (
            "check",
            "group_size=-7 must be -1 (whole row) or an integer of at least 8",
        ),  # of config.json; no option of this command
    ],
)
def test_what_is_no_argument_of_the_command_stays(command, message):
    assert in_options(message, command) == message


def texts(tree):
    """Every string but docstrings, with a hole for each value."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in ast.walk(node)}
            yield "".join(
                part.value if isinstance(part, ast.Constant) else HOLE for part in node.values
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in skipped
        ):
            yield node.value


def functions(tree):
    """Functions and methods, and what stands outside of them."""
    for node in tree.body:
        yield from node.body if isinstance(node, ast.ClassDef) else [node]


def library_messages():
    """What the library says about an argument; a name that is put in is each that its function writes down.

    Left out: cards, which hold code, and what answers a call of a method, an operator or Optimum.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        if room in ("cli", "demo", "nn", "ops") or path.name in (
            "repeat.py",
            "guards.py",
            "optimum.py",
        ):
            continue
        for function in functions(ast.parse(path.read_text())):
            found = list(texts(function))
            for text in filter(lambda text: " " in text, found):
                names = OPTIONS.intersection(found) if f"{HOLE}=" in text else [""]
                yield from (
                    (path.name, text.replace(f"{HOLE}=", f"{name}=").replace(HOLE, "7"))
                    for name in names
                )


def named(text):
    """The arguments that a message names in the form that the command line reads."""
    return set(re.findall(r"(?<![\w/.\"'-])([a-z_]+)=|^([a-z]+_[a-z_]+)(?=: )", text))


COMMANDS = [name for name in _COMMANDS if name != "autoload"]
OPTIONS = set().union(*(command_arguments(name) for name in COMMANDS))
FIELDS = set(signature(QVLMConfig).parameters)
MESSAGES = sorted({entry for entry in library_messages() if named(entry[1])})


def test_messages_are_found():
    found = {text for _, text in MESSAGES}
    assert len(found) > 60
    assert any(text.startswith("num_samples=") for text in found)  # raised
    assert any("leave out activation_granularity=." in text for text in found)  # a warning
    assert "symmetric=7 must be True or False." in found  # whose name is put in


@pytest.mark.parametrize("command", COMMANDS)
def test_no_message_about_an_option_speaks_python(command):
    arguments, spoken = command_arguments(command), []
    for file, text in MESSAGES:
        about = {name for pair in named(text) for name in pair} & (OPTIONS | FIELDS)
        if not about or not about <= arguments.keys():  # of another command, or of Python alone
            continue
        said = in_options(text, command)
        if any(
            arguments[name].choices for name in about
        ):  # the parser refuses other values before the library can
            said = said.replace("None", "")
        if PYTHON.search(said):
            spoken.append(f"{file}: {said}")
    assert spoken == []
