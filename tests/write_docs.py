"""Writes the pages of docs/ that come from code, and the picture: `python tests/write_docs.py`.

tests/test_docs.py compares them with what this makes.
"""

import argparse
import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "bench"))

from picture import picture  # noqa: E402

from qvlm_hf import QVLMConfig, VisionOptimization  # noqa: E402
from qvlm_hf.cli import _COMMANDS, main  # noqa: E402
from qvlm_hf.models import graph  # noqa: E402

WRITTEN = "Written by `python tests/write_docs.py`. Change the code, not this page."


def fields(cls: type) -> list[tuple[str, str, str]]:
    """Name, default and help of every field of a class: help from the docstring, nowhere else."""
    listed = inspect.getdoc(cls).partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", listed, re.M)
    defaults = {
        name: repr(parameter.default).replace("'", '"')
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    missing = defaults.keys() - {name for name, _ in entries} - {"quant_method"}
    if missing:
        raise ValueError(f"{cls.__name__}: no help for {sorted(missing)}")
    return [(name, defaults.get(name, "None"), " ".join(text.split())) for name, text in entries]


def fields_table(cls: type) -> str:
    rows = [f"| `{name}` | `{default}` | {text} |" for name, default, text in fields(cls)]
    return "\n".join(["| field | default | meaning |", "|---|---|---|", *rows])


def fields_page() -> str:
    return page(
        "Fields of QVLMConfig",
        "All fields are keyword-only. A value that breaks a rule is an error with the remedy.\n"
        "[Choosing](choosing.md) says which to start with, [commands](commands.md) how the shell "
        "spells them.",
        fields_table(QVLMConfig),
        "## Fields of VisionOptimization\n\nA value of `optimize_vision`, beside True and False.",
        fields_table(VisionOptimization),
    )


def help_text(*arguments: str) -> str:
    """What `qvlm ... --help` prints, 100 columns wide."""
    with (
        patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.suppress(SystemExit),
    ):
        main([*arguments, "--help"])
    return out.getvalue()


def commands_page() -> str:
    sections = [f"## qvlm {name}\n\n```text\n{help_text(name)}```" for name in _COMMANDS]
    return page(
        "Commands",
        "The exit status is 0, 1 (failed) or 2 (wrong usage). Errors are one line; `--debug` adds "
        "the traceback.\n`optimum-cli qvlm` takes the same commands.",
        "\n\n".join(sections),
    )


def layer_kinds() -> dict[str, dict[str, Any]]:
    """Part -> model_type -> row of the table that says which modules are quantized."""
    return {
        "vision encoder": graph._ENCODERS,
        "projector": graph._PROJECTORS,
        "language model": graph._DECODERS,
    }


def families() -> dict[str, Any]:
    """model_type -> row of the table that says where the parts are."""
    return graph._FAMILIES


def models_page() -> str:
    places = [
        f"| `{name}` | `{row.vision_layers}` | `{row.projector}` | `{row.language_layers}` |"
        for name, row in families().items()
    ]
    sites = [
        f"| {part} | `{kind}` | "
        + " · ".join(", ".join(f"`{module}`" for module in site) for site in row.sites)
        + " |"
        for part, kinds in layer_kinds().items()
        for kind, row in kinds.items()
    ]
    return page(
        "Models",
        "A model is supported when its `model_type` and those of its parts stand here. Others are "
        "refused.\n[Contributing](contributing.md) shows how to add a family.",
        "\n".join(
            [
                "| `model_type` | vision layers | projector | language layers |",
                "|---|---|---|---|",
                *places,
            ]
        ),
        "These linear modules are quantized. Modules between two dots read one input: a *site*.",
        "\n".join(["| part | `model_type` | sites of a layer |", "|---|---|---|", *sites]),
        "The output head is quantized with `lm_head_bits=8`. Every other module stays in full "
        "precision,\nand the report lists it.",
    )


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", WRITTEN, *parts]) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "docs/fields.md": fields_page,
    "docs/commands.md": commands_page,
    "docs/models.md": models_page,
    "docs/measured.svg": picture,
}


def write() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, content in PAGES.items():
        (ROOT / name).write_text(content())


if __name__ == "__main__":
    write()
