"""The card of a saved directory: golden text, every kind of quantization, code that runs, the
picture.
"""

import copy
import dataclasses
import io
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from safetensors.torch import load_file
from spoiled import spoil
from tiny_models import save_tiny, tiny_messages, tiny_processor
from transformers import AutoModelForImageTextToText

from qvlm_hf import QVLMConfig, save_quantized
from qvlm_hf.calibration.report import (
    BlockReport,
    CalibrationReport,
    PrecisionRaise,
    SegmentReport,
    SelfCheck,
    SiteReport,
    VisionReport,
)
from qvlm_hf.calibration.search.blocks import partition_layers
from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.cli import main
from qvlm_hf.demo import dataset_path, model_dir
from qvlm_hf.hub.card import CARD_NAME, PICTURE_NAME, write_card
from qvlm_hf.hub.pictures import _draw_entropies, entropy_picture
from qvlm_hf.hub.saved import REPORT_NAME, SavedModel

GOLDEN = Path(__file__).parent.parent / "golden"
SEARCH = {
    "num_samples": 4,
    "batch_size": 2,
    "percentiles": (1.0, 0.999),
    "margins": (),
    "max_block_depth": 2,
}
DATA = {"dataset": "samples.jsonl", **SEARCH}
DYNAMIC = {"activation_granularity": "dynamic_token", "group_size": 32}
HEAD = {"lm_head_bits": 8, "modules_to_not_convert": ["multi_modal_projector", "layers.0.mlp.fc1"]}
# Kind -> fields of QVLMConfig, and what its card must say.
KINDS = {
    "calibrated": (
        {"scheme": "W4A4", **DATA},
        [
            "> **Warning:** static ranges from 4 samples clip",
            "- Calibrated on 4 samples",
            "Self-check after packing, on 4 samples that calibration had not seen",
            "No answer depends on `model.vision_tower.encoder.layers.2`",
        ],
    ),
    "in memory": (
        {"scheme": "W4A8", "dataset": tiny_messages(8, seed=3), **SEARCH},
        ["dataset=samples", "`samples` are the calibration samples, which were in memory"],
    ),
    "rounded": (
        {"scheme": "W4A16"},
        [
            "Not measured. This asks this model and the full-precision one",
            "qvlm evaluate rounded --dataset test.jsonl --against model --record",
            "qvlm bench rounded --against model --record",
            "- Rounded without data, so nothing was compared",
        ],
    ),
    "dynamic": ({"scheme": "W3A8", "symmetric": True, **DYNAMIC}, ["W3A8"]),
    "budget": ({"scheme": "W4A4", "precision_budget": 3.5, **DATA}, ["the budget was 3.5, spent"]),
    "no guard": (
        {"scheme": "W4A4", "guard": False, "group_size": -1, **DATA},
        ["The guard against modules that few bits break was off.", "per row, rounded"],
    ),
    "vision": (
        {"scheme": "W4A4", "optimize_vision": {"epochs": 2}, **DATA},
        ["Visual encoder optimisation, 2 epochs"],
    ),
    "head": (
        {"scheme": "W4A16", **HEAD},
        [
            "| output head | 1 linear module | 8 bit | float32 |",
            "`modules_to_not_convert` was `multi_modal_projector`, `layers.0.mlp.fc1`.",
            "Linear modules in float32: `model.vision_tower.encoder.layers.*.mlp.fc1` (1), "
            "`model.multi_modal_projector.linear_1`",
        ],
    ),
    "weights": (
        {"scheme": "W4A16", "rotation": "hadamard", **DATA},
        ["a Hadamard rotation folded into the weights", "weights are rounded block by block"],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Layers this small are slower on two threads, and a recorded command sets its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A full-precision model and samples with pictures."""
    root = tmp_path_factory.mktemp("cards")
    save_tiny(root / "model")
    lines = []
    for index, record in enumerate(tiny_messages(8, seed=3)):
        question, answer = record["messages"]
        question["content"][0].pop("image").save(root / f"{index}.png")
        question["content"][0]["path"] = f"{index}.png"
        lines.append(json.dumps({"messages": [question, answer]}))
    (root / "samples.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def saved(root):
    """Kind -> a directory saved by `save_quantized`."""
    return {kind: quantized(root, kind) for kind in KINDS}


@pytest.fixture
def folder(saved, tmp_path):
    """A calibrated model that a test may change."""
    return Path(shutil.copytree(saved["calibrated"], tmp_path / "model"))


def quantized(root, kind):
    fields = dict(KINDS[kind][0])
    if fields.get("dataset") == "samples.jsonl":
        fields["dataset"] = root / "samples.jsonl"
    processor = tiny_processor()
    config = QVLMConfig(**fields, processor=processor if "dataset" in fields else None)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(root / "model", quantization_config=config)
    output, report = root / kind.replace(" ", "-"), model.hf_quantizer.report
    return save_quantized(model, processor, output, report=report)


def code_below(text, heading):
    return re.search(rf"{heading}\n.*?```python\n(.*?)\n```", text, re.S)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_card_that_says_what_was_done(saved, root, kind):
    fields, said = KINDS[kind]
    text, contents = (saved[kind] / CARD_NAME).read_text(), SavedModel(saved[kind])
    for sentence in said:
        assert sentence in " ".join(text.split())
    calibrated = "dataset" in fields
    assert (saved[kind] / PICTURE_NAME).exists() == (f"({PICTURE_NAME})" in text) == calibrated
    assert ("Self-check" in text) == ("### Blocks" in text) == calibrated
    for file in (CARD_NAME, REPORT_NAME, "config.json"):
        assert str(root) not in (saved[kind] / file).read_text()
    prose = re.sub(r"^```.*?^```|^> .*?$", "", text, flags=re.S | re.M)
    assert not re.search(r"\bNone\b|\bnan\b|Undefined|\{\{|\bTODO\b", prose)
    assert "\n\n\n" not in text
    data = ModelCard(text).data
    assert data.tags == ["qvlm", fields["scheme"].lower(), "llava"]
    assert data.base_model is None  # a directory is no Hub id
    assert "base_model_relation" not in data.to_dict()
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == [
        "How to load it", "What is quantized", "Size", "Accuracy", "Speed", "How it was made", "Limits"
    ]  # fmt: skip
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.M)
    assert len(tables) >= 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    shares = [float(share) for share in re.findall(r"([\d.]+) % \|$", text, re.M)]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert all(f"| `{name}` " in text for name in contents.report.modules)
    tensors, full = (
        load_file(path / "model.safetensors").values() for path in (saved[kind], root / "model")
    )
    sizes = contents.sizes(torch.bfloat16)
    assert sizes.total.quantized_bytes == sum(tensor.nbytes for tensor in tensors)
    assert sizes.total.full_precision_bytes == sum(2 * tensor.numel() for tensor in full)


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_makes_the_model_again(saved, root, kind, monkeypatch):
    monkeypatch.chdir(root)
    name = saved[kind].name
    code = code_below((saved[kind] / CARD_NAME).read_text(), "### To repeat it")
    code = code.replace(f'processor, "{name}"', f'processor, "{name}-again"')
    exec(compile(code, "card", "exec"), {"samples": KINDS[kind][0].get("dataset")})
    first, again = (root / path / "model.safetensors" for path in (name, f"{name}-again"))
    assert first.read_bytes() == again.read_bytes()


def test_the_snippet_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(model_dir()), "--scheme", "W8A16", "--output", "demo"]) == 0
    Image.open(dataset_path("test").parent / "images" / "test" / "0001.png").save("picture.png")
    capsys.readouterr()
    code = code_below(Path("demo", CARD_NAME).read_text(), "## How to load it")
    code = code.replace("What is in the picture?", "Which shape is at the top left?")
    exec(compile(code, "card", "exec"), {})
    shapes = {"circle", "square", "triangle", "cross", "star", "nothing", "diamond"}
    assert capsys.readouterr().out.strip() in shapes


def test_a_model_without_report_says_what_its_config_knows(saved, tmp_path):
    loaded = AutoModelForImageTextToText.from_pretrained(saved["calibrated"])
    folder = save_quantized(loaded, None, tmp_path / "again", report=None)
    assert not (folder / REPORT_NAME).exists()
    first, text = ((path / CARD_NAME).read_text() for path in (saved["calibrated"], folder))
    assert "The calibration report was not kept with the model" in text
    assert "calibrated on 4 samples of `samples.jsonl`" in text
    assert "No calibration sample had an answer" not in text
    first, again = (card.split("\n\nWeights")[0].split("## What")[1] for card in (first, text))
    assert first == again


# ---- front matter --------------------------------------------------------------------------------


def front_matter(folder):
    return ModelCard((folder / CARD_NAME).read_text()).data.to_dict()


def test_front_matter_of_a_published_model(folder):
    base_card = ModelCardData(
        license="llama2", language=["en", "fr"], tags=["theirs"], pipeline_tag="image-to-text"
    )
    names = write_card(folder, repo_id="me/tiny-qvlm", base_model="org/tiny", base_card=base_card)
    assert names == (CARD_NAME, PICTURE_NAME)
    text = (folder / CARD_NAME).read_text()
    assert front_matter(folder) == {
        "base_model": "org/tiny", "base_model_relation": "quantized", "language": ["en", "fr"],
        "library_name": "transformers", "license": "llama2", "pipeline_tag": "image-text-to-text",
        "quantized_by": "me", "repo_id": "me/tiny-qvlm", "tags": ["qvlm", "w4a4", "llava"],
    }  # fmt: skip
    assert 'from_pretrained("me/tiny-qvlm")' in text
    assert "# tiny-qvlm\n\n[org/tiny](https://huggingface.co/org/tiny),\nquantized to 4-bit" in text
    write_card(folder)  # after a measurement
    assert (folder / CARD_NAME).read_text() == text


@pytest.mark.parametrize(
    ("base_card", "license", "expected"),
    [
        (None, None, ("mit", None, None)),
        ({"license": "gemma"}, None, ("gemma", None, None)),
        ({"license": "gemma"}, "llama2", ("llama2", None, None)),
        (
            {"license": "other", "license_name": "theirs", "license_link": "https://a.org/b"},
            None,
            ("other", "theirs", "https://a.org/b"),
        ),
        # old cards say "other" and nothing else, which the Hub refuses today
        (
            {"license": "other"},
            None,
            ("other", "license of org/base", "https://huggingface.co/org/base"),
        ),
    ],
)
def test_licences(folder, base_card, license, expected):
    (folder / CARD_NAME).write_text("---\nlicense: mit\nthumbnail: a.png\n---\n")
    base_card = None if base_card is None else ModelCardData(**base_card)
    write_card(folder, base_model="org/base", license=license, base_card=base_card, author="her")
    write_card(folder)  # keeps what was copied
    data = front_matter(folder)
    assert tuple(map(data.get, ("license", "license_name", "license_link"))) == expected
    assert (data["quantized_by"], data["thumbnail"]) == ("her", "a.png")


@pytest.mark.parametrize(
    "path",
    ["/home/me/models/base", "made in /tmp/out", "C:\\Users\\me", "~/models", "file:///tmp/a.png"],
)
def test_no_path_of_this_machine_gets_into_a_card(folder, path):
    card = f"---\nkept: [see https://a.org/b/c, a/b/c, ~5, and/or, /v1, '{path}']\n---\n"
    (folder / CARD_NAME).write_text(card.replace(path, "no path"))
    write_card(folder)
    (folder / CARD_NAME).write_text(card)
    with pytest.raises(ValueError, match=r"model card: holds the absolute path .*: name the file"):
        write_card(folder)
    assert (folder / CARD_NAME).read_text() == card


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"model: holds no config\.json: name the directory of a saved"),
        ("config.json", "{}", "model: is not quantized by qvlm_hf: name a directory that qvlm"),
        ("model.safetensors", None, r"holds no model\.safetensors: "),
        (REPORT_NAME, "{", f"{REPORT_NAME}: is no JSON .*: delete it, or quantize the model again"),
        (REPORT_NAME, "[]", f"{REPORT_NAME}: cannot be used .*: delete it, or quantize"),
        (REPORT_NAME, '"x"', f"{REPORT_NAME}: cannot be used .*: delete it, or quantize"),
        (REPORT_NAME, '{"modules": 3}', f"{REPORT_NAME}: cannot be used .*: delete it"),
        (CARD_NAME, "---\na: [\n---\n", r"README\.md: its front matter cannot be read .*: mend or"),
        (CARD_NAME, "---\n- a\n---\n", r"README\.md: its front matter cannot be read"),
        (CARD_NAME, "---\nrepo_id: 7\n---\n", r"README\.md: its repo_id 7 must be 'owner/name'"),
    ],
)
def test_damaged_directories_are_one_line(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        write_card(folder)
    assert "\n" not in str(caught.value)


# ---- golden --------------------------------------------------------------------------------------


VERSIONS = {"python": "3.11.7", "qvlm_hf": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}


def full_report(measured: CalibrationReport) -> CalibrationReport:
    """A report with everything in it, made of fixed figures, about the modules of `measured`."""
    vision, language = (
        f"model.{part}.layers" for part in ("vision_tower.encoder", "language_model")
    )
    block = BlockReport(
        layers=(f"{vision}.0", f"{vision}.1"),
        initial=0.012,
        greedy=0.011,
        joint=0.0105,
        evaluations=9.5,
    )
    single = BlockReport(
        layers=(f"{language}.0",), initial=0.02, greedy=0.019, joint=0.019, evaluations=3.0
    )
    other = dataclasses.replace(single, layers=(f"{language}.1",))
    share = {"value": 0.93, "interval": [0.886, 0.958], "correct": 186, "total": 200}
    figure = {"seconds": 0.1, "spread": 0.031, "speedup": 1.0}
    row = {
        "way": "bfloat16", "batch": 1, "error": None, "first_token": figure, "decode": {"time": figure},
        "tokens_per_second": 10.0, "weight_bytes": 2**31, "peak_bytes": None,
        "kernel": None,
    }  # fmt: skip
    faster = row | {
        "way": "qvlm_hf W4A4",
        "first_token": figure | {"speedup": 1.514},
        "peak_bytes": 2**29,
        "kernel": "cpu portable",
    }
    return dataclasses.replace(
        measured,
        settings={**measured.settings, "guard": True, "token_importance": True, "equalization": True, "weight_rounding": "gptq"},
        provenance={
            "base_model": "org/llava-tiny", "base_model_revision": "0123456789abcdef0123456789abcdef01234567", "dataset": "samples.jsonl",
            "samples": 64, "images": 60, "tokens": 4321, "sha256": "ab" * 32, "seed": 0, "threads": 2, "versions": VERSIONS,
        },
        segments=(
            SegmentReport(
                component="vision", layers=(*block.layers, f"{vision}.2"), entropies=(1.5,), threshold=1.4, blocks=(block,)
            ),
            SegmentReport(
                component="language", layers=(*single.layers, *other.layers), entropies=(1.2,), threshold=1.2, blocks=(single, other)
            ),
        ),
        sites=(SiteReport(modules=(f"{language}.0.mlp.down_proj",), candidate=RangeCandidate(granularity="dynamic_token")),),
        sensitivities={f"{language}.0.mlp.down_proj": 0.0123},
        lifts=(PrecisionRaise(site=f"{language}.0.mlp.down_proj", weight_bits=4, activation_bits=8, before=0.0123, after=0.0004),),
        vision=VisionReport(epochs=10, error_before=0.05, error_after=0.04, kept=True, depth_before=1.5, depth_after=1.25),
        average_weight_bits=4.0,
        self_check=SelfCheck(samples=16, held_out=True, answer_tokens=33, agreement=0.97, kl=0.0017),
        warnings=("a warning of the calibration.",),
        evaluation={
            "dataset": "test.jsonl", "questions": 200, "sha256": "cd" * 32, "seed": 0, "batch_size": 16, "reference": "org/llava-tiny",
            "accuracy": share, "by_kind": {"colour": share}, "device": "a processor", "threads": 2, "versions": VERSIONS,
            "command": "qvlm evaluate llava-tiny-qvlm-w4a4 --dataset test.jsonl --against "
                       "org/llava-tiny --seed 0 --record",
            "comparison": {
                "reference_accuracy": share | {"value": 0.92, "correct": 184}, "both_right": 183, "only_reference": 1, "only_model": 3,
                "both_wrong": 13, "mcnemar_p_value": 0.625, "difference": 0.01, "difference_interval": [-0.016, 0.038],
                "answer_kl_nats": 0.0054, "answer_tokens": 428,
            },
        },
        benchmark={
            "device": "a processor", "device_type": "cpu", "threads": 2, "versions": VERSIONS, "together": True,
            "settings": {"rounds": 5, "compile": False, "prompt_tokens": 608, "images": 1, "new_tokens": 32},
            "rows": [row, faster, row | {"way": "a peer", "error": "not installed"}],
            "command": "qvlm bench llava-tiny-qvlm-w4a4 --against org/llava-tiny --record",
        },
    )  # fmt: skip


@pytest.mark.parametrize("cases", [50, pytest.param(4000, marks=pytest.mark.slow)])
def test_a_damaged_report_ends_in_one_line_or_is_shown(folder, cases, capsys):
    whole, refused = full_report(SavedModel(folder).report).to_dict(), 0
    parts = ("segments", "settings", "provenance", "evaluation", "benchmark")
    for seed in range(cases):
        rng, report = random.Random(seed), copy.deepcopy(whole)
        said = spoil(rng.choice([report, *(report[part] for part in parts)]), rng)
        (folder / REPORT_NAME).write_text(json.dumps(report))
        message = ""
        try:
            write_card(folder)
        except ValueError as error:
            message = str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {said}: {error!r}") from error
        assert "\n" not in message, f"seed {seed}, {said}"
        refused += message != ""
        status = main(["inspect", str(folder)])
        told = capsys.readouterr().err
        assert (status, told) == (0, "") or f"qvlm: error: {REPORT_NAME}: cannot be used (" in told
    assert cases / 4 < refused < cases  # most figures and names are only shown


@pytest.mark.parametrize("name", ["full", "rounded"])
def test_golden(saved, tmp_path, name):
    folder = Path(shutil.copytree(saved["dynamic"], tmp_path / "model"))
    report = SavedModel(folder).report
    fixed = (
        full_report(report)
        if name == "full"
        else dataclasses.replace(
            report, provenance={"base_directory": "llava-tiny", "versions": VERSIONS}
        )
    )
    (folder / REPORT_NAME).write_text(json.dumps(fixed.to_dict()))
    assert SavedModel(folder).report == fixed
    (folder / CARD_NAME).unlink()
    hub = (
        {
            "repo_id": "me/llava-tiny-qvlm",
            "base_card": ModelCardData(license="llama2", language="en"),
        }
        if name == "full"
        else {}
    )
    write_card(folder, **hub)
    text = (folder / CARD_NAME).read_text()
    golden = GOLDEN / f"model_card_{name}.md"
    assert text == golden.read_text(), (
        f"if the change is meant: copy the new text to tests/golden/{golden.name}"
    )


def test_a_cell_cannot_break_its_table(saved, tmp_path):
    folder = Path(shutil.copytree(saved["dynamic"], tmp_path / "model"))
    report = full_report(SavedModel(folder).report)
    kinds = {"a|b\nc": report.evaluation["accuracy"]}
    report = dataclasses.replace(report, evaluation=report.evaluation | {"by_kind": kinds})
    (folder / REPORT_NAME).write_text(json.dumps(report.to_dict()))
    write_card(folder)
    assert "| a\\|b c | " in (folder / CARD_NAME).read_text()


# ---- the picture, looked at through its pixels ---------------------------------------------------


def segment(component, entropies, *, dead=0):
    blocks, threshold = partition_layers(entropies, max_block_depth=3)
    layers = tuple(f"{component}.{index}" for index in range(len(entropies) + 1 + dead))
    errors = dict.fromkeys(("initial", "greedy", "joint", "evaluations"), 1.0)
    return SegmentReport(
        component=component,
        layers=layers,
        entropies=tuple(entropies),
        threshold=threshold,
        blocks=tuple(BlockReport(layers=layers[b.start : b.stop], **errors) for b in blocks),
    )


def test_a_picture_has_the_same_bytes_for_the_same_report():
    one, other = (
        [segment("vision", [1.0, 2.0, last], dead=1), segment("language", [2.0, 1.0])]
        for last in (1.5, 1.6)
    )
    assert entropy_picture(one) == entropy_picture(one) != entropy_picture(other)
    assert Image.open(io.BytesIO(entropy_picture(one))).info.keys() <= {"dpi"}  # names no program
    assert entropy_picture([]) is None
    assert entropy_picture([segment("projector", [])]) is None


@pytest.mark.parametrize("layers", [2, 24, 80])
def test_a_panel_per_segment_with_blocks_as_bands(layers):
    entropies = [1.5 + (index % 5) / 10 for index in range(layers - 1)]
    pictures = (
        [segment("language", entropies)],
        [segment("vision", entropies), segment("projector", []), segment("language", entropies)],
    )
    single, both = (
        np.asarray(Image.open(io.BytesIO(entropy_picture(segments))).convert("RGB"))
        for segments in pictures
    )
    assert single.shape[1] == both.shape[1] == 1080
    assert both.shape[0] > 1.8 * single.shape[0]
    colours, counts = np.unique(single.reshape(-1, 3), axis=0, return_counts=True)
    large = {tuple(map(int, colour)) for colour in colours[counts > 0.05 * counts.sum()]}
    bands = [(0xDF, 0xE8, 0xF3), (0xF3, 0xEA, 0xD9)]
    assert set(bands if layers > 2 else bands[:1]) <= large


def test_points_between_two_blocks_are_told_from_those_inside_one():
    from matplotlib.figure import Figure

    axes, drawn = Figure().subplots(), segment("language", [1.5, 1.6, 1.9, 1.4, 1.5, 1.6, 1.7])
    _draw_entropies(axes, drawn)
    found = {line.get_label(): set(line.get_xdata()) for line in axes.lines}
    between = {drawn.layers.index(block.layers[-1]) + 0.5 for block in drawn.blocks[:-1]}
    assert found["between two blocks"] == between != set()
    assert found["inside a block"] == {k + 0.5 for k in range(7)} - between != set()
