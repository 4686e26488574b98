"""Every image-text-to-text family of Transformers, tiny: is it read, does a W8A8 of it work?

    python tests/models/survey.py [FAMILY ...] [--json tests/models/survey.json]

Per family: how it was run, sites, norm pairs, percent of the weights in sites; then a W8A8 with
ranges per token found at run time, saved and loaded again: the same logits bit for bit, the same
greedy text, and how far the answers are from full precision. `python tests/write_docs.py` puts the
file into docs/models.md; test_survey.py, a slow test, compares it.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from shrunken_families import FAMILIES, tiny_model

import qvlm_hf
from qvlm_hf.hf.saving import save_quantized
from qvlm_hf.models.by_structure import Structure, read_structure
from qvlm_hf.models.coverage import measure_coverage
from qvlm_hf.models.experts import experts_split

NEW_TOKENS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # tiny matrices
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = {}
    for family in options.families:
        rows[family] = row = survey(family)
        print(f"{family:24} " + "  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(summary(rows), indent=1) + "\n")
    for stage in ("built", "read", "quantized", "reloaded", "text"):
        print(f"{stage}: {sum(str(row.get(stage)).startswith('yes') for row in rows.values())}")


def summary(rows: dict[str, dict]) -> dict:
    """Family -> percent of its layers' weights that are quantized; or why it does not work."""
    works = {name: row for name, row in rows.items() if row.get("text", "").startswith("yes")}
    return {
        "transformers": transformers.__version__,
        "works": {name: row["percent_of_layers"] for name, row in works.items()},
        "fails": {
            name: row.get("error", "other text after loading")
            for name, row in rows.items()
            if name not in works
        },
    }


def survey(family: str) -> dict:
    """What came of one family; the first error ends it."""
    row: dict = {}
    start = time.perf_counter()
    try:
        model = tiny_model(family)
        row["built"] = "yes"
        structure = read_structure(model)
        row |= {"read": "yes", "run": structure.run} | described(model, structure)
        quantize(model, structure, row)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        row["at"] = f"{Path(frame.filename).name}:{frame.lineno}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def described(model: torch.nn.Module, structure: Structure) -> dict:
    with experts_split(model):
        modules = [name for s in structure.segments for site in s.sites for name in site.modules]
        coverage = measure_coverage(model, modules, structure.left_out)
    sites: dict[str, int] = {}
    for segment in structure.segments:
        count = sum(len(layer.sites) for layer in segment.layers)
        sites[segment.component] = sites.get(segment.component, 0) + count
    held = sum(
        part.parameters for part in coverage.kept if part.reason in ("embedding", "output head")
    )
    quantized = coverage.percent / 100 * coverage.parameters
    return {
        "sites": sites,
        "dead": [layer.name for s in structure.segments for layer in s.layers if layer.dead],
        "percent_of_layers": round(100 * quantized / (coverage.parameters - held)),
    } | coverage.summary()


def quantize(model: torch.nn.Module, structure: Structure, row: dict) -> None:
    """Quantizes, saves, loads and compares."""
    config = qvlm_hf.QVLMConfig(scheme="W8A8", activation_granularity="dynamic_token")
    inputs = {name: value for name, value in structure.inputs.items() if name != "use_cache"}
    inputs = inputs or {"input_ids": torch.arange(5, 13)[None]}
    with torch.no_grad():
        before = logits(model, inputs)
        report = qvlm_hf.quantize_model(model, config)
        row["modules"] = len(report.modules)
        after = logits(model, inputs)
        if not torch.isfinite(after).all():
            raise ValueError("the quantized model answers NaN")
        row["quantized"] = "yes"
        row["error_of_logits"] = f"{float((after - before).norm() / before.norm()):.3f}"
        again = reloaded(model)
        row["reloaded"] = "yes" if torch.equal(logits(again, inputs), after) else "differs"
        row["text"] = same_text(model, again, inputs)
    with tempfile.TemporaryDirectory() as directory:
        save_quantized(model, None, directory, report=report)  # with its card


def reloaded(model: torch.nn.Module) -> torch.nn.Module:
    attention = model.config._attn_implementation
    # loading forgets it
    chosen = {"attn_implementation": attention} if attention == "eager" else {}
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return type(model).from_pretrained(directory, **chosen).eval()


def logits(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    torch.manual_seed(0)
    answer = model(**inputs)
    return (answer.logits if hasattr(answer, "logits") else answer[0]).float()


def same_text(model: torch.nn.Module, again: torch.nn.Module, inputs: dict) -> str:
    """Whether greedy decoding, or the forward pass where `generate` refuses, gives equal tokens."""
    try:
        texts = [
            one.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            for one in (model, again)
        ]
    except Exception as error:
        same = logits(model, inputs).argmax(-1).equal(logits(again, inputs).argmax(-1))
        return (
            f"{'yes' if same else 'no'} (forward; generate: {' '.join(str(error).split())[:120]})"
        )
    return "yes" if texts[0].equal(texts[1]) else "no"


if __name__ == "__main__":
    main()
