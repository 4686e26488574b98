"""Messages of the library as the command line shows them: with its options, without Python's."""

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
            "precision_budget=1.5 must be 2 to 8",
            "--precision-budget 1.5 must be 2 to 8",
        ),
        ("quantize", "modules_to_not_convert: 'nose' is", "--modules-to-not-convert: 'nose' is"),
        ("quantize", "give (dataset='my samples.jsonl')", "give (--dataset 'my samples.jsonl')"),
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
        ("quantize", "strict=True: leave out dataset=.", "--strict: leave out --dataset."),
        ("quantize", "a smaller batch_size=, or more", "a smaller --batch-size, or more"),
        ("quantize", "seed=-1 must be below 2**63.", "--seed -1 must be below 2**63."),
        ("quantize", "repo_id='a b' must be", "--push-to-hub 'a b' must be"),
        ("publish", "repo_id='a b' must be", "REPO 'a b' must be"),
        ("publish", "create_pr=True or revision='dev'.", "--create-pr or --revision dev."),
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
    "message",
    [
        "/data/batch_size/x.jsonl: no such file or folder (looked in /seed=3/group_size)",
        'x.jsonl:3: key "num_samples" is unknown here, and "answer" is missing',
        "columns num_samples and batch_size are odd",
        "seed=3/data.jsonl: no such file",
        "dataset: holds no samples",  # a folder of that name
        "model: is quantized already",
        "the dataset: has no samples",
    ],
)
def test_what_is_no_argument_stays(message):
    assert in_options(message, "quantize") == message


def test_an_argument_of_another_command_stays():
    message = "group_size=-7 must be -1 (whole row) or an integer of at least 8"  # of config.json
    assert in_options(message, "check") == message


def texts(tree):
    """Every string but docstrings, with a hole for each value."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in ast.walk(node)}
            parts = node.values
            yield "".join(p.value if isinstance(p, ast.Constant) else HOLE for p in parts)
        elif isinstance(node, ast.Constant) and id(node) not in skipped:
            yield from [node.value] if isinstance(node.value, str) else []


def functions(tree):
    """Functions and methods, and what stands outside of them."""
    for node in tree.body:
        yield from node.body if isinstance(node, ast.ClassDef) else [node]


def library_messages():
    """(file, message about an argument); a name that is put in is each in its function.

    Left out: cards, which hold code, and answers to calls of a method, an operator or Optimum.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        python_alone = path.name in ("repeat.py", "refusals.py")
        if python_alone or room in ("cli", "demo", "nn", "ops", "optimum"):
            continue
        for function in functions(ast.parse(path.read_text())):
            found = list(texts(function))
            for text in filter(lambda text: " " in text, found):
                names = (OPTIONS.intersection(found) or FIELDS) if f"{HOLE}=" in text else [""]
                for name in names:
                    yield path.name, text.replace(f"{HOLE}=", f"{name}=").replace(HOLE, "7")


def named(text):
    """The arguments that a message names in the form that the command line reads."""
    pairs = re.findall(r"(?<![\w/.\"'-])([a-z_]+)=|^([a-z]+_[a-z_]+)(?=: )", text)
    return {name for pair in pairs for name in pair if name}


COMMANDS = [name for name in _COMMANDS if name != "autoload"]
OPTIONS = set().union(*(command_arguments(name) for name in COMMANDS))
FIELDS = set(signature(QVLMConfig).parameters)
MESSAGES = sorted({entry for entry in library_messages() if named(entry[1])})


def test_messages_are_found():
    found = {text for _, text in MESSAGES}
    assert len(found) > 60
    assert any(text.startswith("num_samples=") for text in found)  # raised
    assert any("leave out activation_granularity=." in text for text in found)  # a warning
    assert "num_samples=7 must be a whole number of at least 77." in found  # whose name is put in


@pytest.mark.parametrize("command", COMMANDS)
def test_no_message_about_an_option_speaks_python(command):
    arguments, spoken = command_arguments(command), []
    for file, text in MESSAGES:
        about = named(text) & (OPTIONS | FIELDS)
        if not about or not about <= arguments.keys():  # of another command, or of Python alone
            continue
        said = in_options(text, command)
        # the parser refuses other values before the library can
        if any(arguments[name].choices for name in about):
            said = said.replace("None", "")
        if PYTHON.search(said):
            spoken.append(f"{file}: {said}")
    assert spoken == []
