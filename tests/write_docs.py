"""Writes the pages of docs/ that come from code, and the picture: `python tests/write_docs.py`.

tests/test_docs.py compares them with what this makes.
"""

import argparse
import contextlib
import inspect
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("bench", "models")]

import torch  # noqa: E402
from picture import picture  # noqa: E402
from test_families import BOTH_WAYS, CALIBRATED, COMBINATIONS, REFUSED  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText  # noqa: E402

from qvlm_hf import QVLMConfig, VisionOptimization  # noqa: E402
from qvlm_hf.cli import _COMMANDS, main  # noqa: E402
from qvlm_hf.hf.round_on_load import planned_report  # noqa: E402
from qvlm_hf.models.families import FAMILIES, Family  # noqa: E402
from qvlm_hf.models.folds import why_not_rotatable  # noqa: E402
from qvlm_hf.models.layer_kinds import LAYER_KINDS  # noqa: E402
from qvlm_hf.models.wirings import LayerKind  # noqa: E402

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


def by_structure() -> str:
    """What tests/models/survey.py found of families without a row."""
    found = json.loads((ROOT / "tests" / "models" / "survey.json").read_text())
    works = [name for name in sorted(found["works"]) if name not in FAMILIES]
    # the first sentence of an error says it
    fails = {name: error for name, error in found["fails"].items() if name not in FAMILIES}
    reasons = {name: re.split(r"[.;] | \(|\n", error)[0] for name, error in fails.items()}
    rows = [f"| `{name}` | {reason} |" for name, reason in sorted(reasons.items())]
    return (
        f"Of the {len(works) + len(rows)} other image-text-to-text families of Transformers "
        f"{found['transformers']}, these {len(works)} work:\na tiny random model in W8A8 gives "
        f"the same greedy text after saving and loading.\nWhere `generate` does not take the model "
        f"alone, the likeliest tokens of one pass are compared.\n\n"
        + textwrap.fill(", ".join(f"`{name}`" for name in works), 100, break_on_hyphens=False)
        + ".\n\nThese do not, or their tiny model was not made:\n\n"
        + "\n".join(["| `model_type` | what happened |", "|---|---|", *rows])
    )


def sites_cell(kind: LayerKind) -> str:
    names = [[f"`{module}`" if module else "itself" for module in site] for site in kind.sites]
    return " · ".join(map(", ".join, names)) or "no linear module"


def projectors_cell(row: Family) -> str:
    return f"`{row.projector}`" + (f" and `{row.further}`" if row.further else "")


def limits_cell(kind: LayerKind) -> str:
    limits = []
    if kind.no_rotation:
        limits.append(f"no rotation: {kind.no_rotation}")
    if kind.packed:
        limits.append("no ranges per position: tokens have no fixed place in a row")
    return "; ".join(limits)


def family_row(family: str) -> str:
    """The row of a family: its default configuration counted, and what the tests check of it."""
    config = AutoConfig.for_model(family)
    tried = [one for one in COMBINATIONS if one[0] == family]
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (ImportError, ValueError) as error:
        reason = re.split(r" but it was not found| \(got", str(error).strip())[0]
        refused = all(decoder in REFUSED for *_, decoder in tried)
        counted = ["not counted", "no" if refused else "exact", f"not built: {reason}"]
    else:
        settings = QVLMConfig(scheme="W4A16").settings()
        found = planned_report(model, settings).provenance["coverage"]
        kept = ", ".join(f"{reason} {share} %" for reason, share in found["kept"].items())
        rotation = "no" if why_not_rotatable(model) else "exact"
        counted = [f"{found['percent']} %", rotation, kept]
    percent, rotation, kept = counted
    calibrated = [one for one in CALIBRATED if one[0] == family]
    cache = "reads both ways" if set(BOTH_WAYS) & set(tried) else "same text"
    towers, decoders = ({one[place] for one in tried} for place in (1, 2))
    cells = [
        f"`{family}`", percent, f"{len(towers)} x {len(decoders)}", rotation,
        "exact" if tried else "", "bit-equal" if calibrated else "",
        cache if calibrated else "", kept,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def models_page() -> str:
    rows = [
        f"| `{name}` | {projectors_cell(row)}: {sites_cell(row.projector_kind)} | "
        + "; ".join(f"`{path}`: {reason}" for path, reason in row.unquantized.items())
        + " |"
        for name, row in FAMILIES.items()
    ]
    layers = [
        f"| `{name}` | {sites_cell(kind)} | {limits_cell(kind)} |"
        for name, kind in LAYER_KINDS.items()
    ]
    return page(
        "Models",
        "The whole method works where the `model_type` stands here, and the class of its layers "
        "below.\nAny tower goes with any decoder. [Others](#by-structure) are read by structure.\n"
        "[Contributing](contributing.md) shows how to add one.",
        "\n".join(
            [
                "| `model_type` | quantized | tried | rotation | equalization | saved | cache | in "
                "full precision |",
                "|---|---|---|---|---|---|---|---|",
                *map(family_row, FAMILIES),
            ]
        ),
        "*Quantized* is the share of the weights of the default configuration; the last column "
        "names\nthe rest. `tests/models/test_families.py` makes the other columns true, on small "
        "random models\nwith so many towers x decoders:\n\n"
        "- *Rotation* and *equalization*: the full-precision model answers as before.\n"
        "- *Saved*: calibrated at W4A4 and saved in shards, under the keys of the Hub and under "
        "those of\n  the modules. Loaded again it answers the same, bit for bit.\n"
        "- *Cache*: text generated with a key-value cache is the text without one. Models that "
        "read\n  prompts both ways cannot be compared so.",
        "\n".join(["| `model_type` | projector | left out |", "|---|---|---|", *rows]),
        "These linear modules are quantized. Modules between two dots read one input: a *site*.",
        "\n".join(["| layers | sites | limits |", "|---|---|---|", *layers]),
        "A path of experts stands for one linear module an expert. Together they are one site: each "
        "has\na range of its own for the tokens that it gets. Routers stay in full precision. The "
        "report counts\nthe tokens of every expert. An expert that saw fewer than 64 has the range of "
        "all experts of its\nlayer and plainly rounded weights, and is named. (Transformers 5.24.0 by "
        "itself runs no `llama4`.)",
        "The output head is quantized with `lm_head_bits=8`. Patch and position embeddings, norms "
        "and\nembeddings of tokens stay in full precision. So does the pooling head of a SigLIP "
        "tower, whose\noutput is not used. The report lists every linear module that stays.",
        "## By structure\n\nA family without a row is run once on a made-up picture and text. Linear "
        "modules that read one\ntensor form a site. That is enough for schemes without calibration:",
        '```python\nfrom qvlm_hf import QVLMConfig\n\nQVLMConfig(scheme="W8A8", activation_granularity="dynamic_token")\n'
        'QVLMConfig(scheme="W4A16")  # weights alone\n```',
        "Data, rotation, equalization and `lm_head_bits` need a row and are refused. Report, card "
        "and\n`qvlm inspect` say how many percent of the weights are quantized, and why the rest is "
        "not.\nBelow 80 % is a warning. The tensors of a saved model have the names of its modules.",
        by_structure(),
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
