"""The card of a saved directory: golden text, every kind of quantization, code that runs, the
picture.
"""

import copy
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
from tiny_models import save_tiny, save_tiny_samples, tiny_messages, tiny_processor
from transformers import AutoModelForImageTextToText

from qvlm_hf import QVLMConfig, save_quantized
from qvlm_hf.calibration.record.report import BlockReport, SegmentReport
from qvlm_hf.calibration.search.blocks import partition_layers
from qvlm_hf.cli import main
from qvlm_hf.demo import dataset_path, model_dir
from qvlm_hf.hub.card import CARD_NAME, PICTURE_NAME, write_card
from qvlm_hf.hub.pictures import _draw_entropies, entropy_picture
from qvlm_hf.hub.saved import REPORT_NAME, SavedModel

GOLDEN = Path(__file__).parent.parent / "golden"
SEARCH = {"recipe": "fixed", "num_samples": 4, "batch_size": 2}
SEARCH |= {"percentiles": (1.0, 0.999), "margins": ()}
DATA = {"dataset": "samples.jsonl", "max_block_depth": 2, **SEARCH}
CHECK = {"samples": 16, "answer_tokens": 33, "agreement": 0.97, "kl": 0.0017}
DYNAMIC = {"activation_granularity": "dynamic_token", "group_size": 32}
HEAD = {"lm_head_bits": 8, "modules_to_not_convert": ["multi_modal_projector", "layers.0.mlp.fc1"]}
# Kind -> fields of QVLMConfig, and what its card must say beyond the golden ones.
KINDS = {
    "calibrated": (
        {"scheme": "W4A4", **DATA},
        [
            "> **Warning:** static ranges from 4 samples clip",
            "6 in W4A4, static ranges per channel |",
        ],
    ),
    "in memory": (
        {"scheme": "W4A8", "dataset": tiny_messages(8, seed=3), **SEARCH},
        ["`samples` are the calibration samples, which were in memory"],
    ),
    "rounded": (
        {"scheme": "W4A16"},
        [
            "qvlm evaluate rounded --dataset test.jsonl --against model --record",
            "qvlm bench rounded --against model --record",
            "- Rounded without data, so nothing was compared",
        ],
    ),
    "dynamic": ({"scheme": "W3A8", "symmetric": True, **DYNAMIC}, ["W3A8, ranges per token at"]),
    "budget": ({"scheme": "W4A4", "precision_budget": 3.5, **DATA}, ["; the budget was 3.5."]),
    "rows": ({"scheme": "W4A4", "guard": False, "group_size": -1, **DATA}, ["per row, rounded"]),
    "vision": (
        {"scheme": "W4A4", "optimize_vision": {"epochs": 2}, **DATA},
        ["Calibrated on 4 samples"],
    ),
    "head": (
        {"scheme": "W4A16", **HEAD},
        [
            "| output head | 1 in W8A16 |",
            "| language model | 14 in W4A16 |",
            "| projector | 2 in float32 |",
            "and so do `model.vision_tower.encoder.layers.*.mlp.fc1` (1), "
            "`model.multi_modal_projector.linear_1`, `model.multi_modal_projector.linear_2`.",
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
    save_tiny_samples(root, 8)
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


def run_code(folder, heading, **changes):
    """Runs the block of Python below a heading of the card."""
    code = re.search(rf"{heading}\n.*?```python\n(.*?)\n```", card(folder), re.S)[1]
    for old, new in changes.pop("replaced"):
        code = code.replace(old, new)
    exec(compile(code, "card", "exec"), changes)


def card(folder):
    return (folder / CARD_NAME).read_text()


def front_matter(folder):
    return ModelCard(card(folder)).data.to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_card_that_says_what_was_done(saved, root, kind):
    fields, said = KINDS[kind]
    text, sizes = card(saved[kind]), SavedModel(saved[kind]).sizes(torch.bfloat16)
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
    for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    *parts, total = (
        int(cell.replace(",", "")) for cell in re.findall(r"\| ([\d,]+) \| \d+\.\d\d MiB", text)
    )
    assert sum(parts) == total
    tensors, full = (
        load_file(path / "model.safetensors").values() for path in (saved[kind], root / "model")
    )
    assert sizes.total.quantized_bytes == sum(tensor.nbytes for tensor in tensors)
    assert sizes.total.full_precision_bytes == sum(2 * tensor.numel() for tensor in full)


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_makes_the_model_again(saved, root, kind, monkeypatch):
    monkeypatch.chdir(root)
    name, samples = saved[kind].name, KINDS[kind][0].get("dataset")
    renamed = (f'processor, "{name}"', f'processor, "{name}-again"')
    run_code(saved[kind], "### To repeat it", samples=samples, replaced=[renamed])
    first, again = (root / path / "model.safetensors" for path in (name, f"{name}-again"))
    assert first.read_bytes() == again.read_bytes()


def test_the_snippet_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(model_dir()), "--scheme", "W8A16", "--output", "demo"]) == 0
    Image.open(dataset_path("test").parent / "images" / "test" / "0001.png").save("picture.png")
    capsys.readouterr()
    asked = ("What is in the picture?", "Which shape is at the top left?")
    run_code(Path("demo"), "## How to load it", replaced=[asked])
    shapes = {"circle", "square", "triangle", "cross", "star", "nothing", "diamond"}
    assert capsys.readouterr().out.strip() in shapes


def test_a_model_without_report_says_what_its_config_knows(saved, tmp_path):
    loaded = AutoModelForImageTextToText.from_pretrained(saved["calibrated"])
    folder = save_quantized(loaded, None, tmp_path / "again", report=None)
    assert not (folder / REPORT_NAME).exists()
    text = card(folder)
    assert "The calibration report was not kept with the model" in text
    assert "calibrated on 4 samples of `samples.jsonl`" in text
    assert "No calibration sample had an answer" not in text
    first, again = (
        it.split("## What")[1].split("rounded")[0] for it in (card(saved["calibrated"]), text)
    )
    assert first == again


# ---- front matter --------------------------------------------------------------------------------


def test_front_matter_of_a_published_model(folder):
    base_card = ModelCardData(
        license="llama2", language=["en", "fr"], tags=["theirs"], pipeline_tag="image-to-text"
    )
    names = write_card(folder, repo_id="me/tiny-qvlm", base_model="org/tiny", base_card=base_card)
    assert names == (CARD_NAME, PICTURE_NAME)
    text = card(folder)
    assert front_matter(folder) == {
        "base_model": "org/tiny", "base_model_relation": "quantized", "language": ["en", "fr"],
        "library_name": "transformers", "license": "llama2", "pipeline_tag": "image-text-to-text",
        "quantized_by": "me", "repo_id": "me/tiny-qvlm", "tags": ["qvlm", "w4a4", "llava"],
    }  # fmt: skip
    assert 'from_pretrained("me/tiny-qvlm")' in text
    assert "# tiny-qvlm\n\n[org/tiny](https://huggingface.co/org/tiny),\nquantized to 4-bit" in text
    write_card(folder)  # after a measurement
    assert card(folder) == text


THEIRS = {"license": "other", "license_name": "theirs", "license_link": "https://a.org/b"}
OTHER = ("other", "license of org/base", "https://huggingface.co/org/base")


@pytest.mark.parametrize(
    ("base_card", "license", "expected"),
    [
        (None, None, ("mit", None, None)),
        ({"license": "gemma"}, None, ("gemma", None, None)),
        ({"license": "gemma"}, "llama2", ("llama2", None, None)),
        (THEIRS, None, tuple(THEIRS.values())),
        # old cards say "other" and nothing else, which the Hub refuses today
        ({"license": "other"}, None, OTHER),
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
    text = f"---\nkept: [see https://a.org/b/c, a/b/c, ~5, and/or, /v1, '{path}']\n---\n"
    (folder / CARD_NAME).write_text(text.replace(path, "no path"))
    write_card(folder)
    (folder / CARD_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"model card: holds the absolute path .*: name the file"):
        write_card(folder)
    assert card(folder) == text


# ---- golden --------------------------------------------------------------------------------------


def full_report(folder):
    """A report with everything in it, of fixed figures, about the modules of a saved model."""
    fixed = json.loads((GOLDEN / "report_full.json").read_text())
    measured = json.loads((folder / REPORT_NAME).read_text())
    return measured | fixed | {"settings": measured["settings"] | fixed["settings"]}


@pytest.mark.parametrize("cases", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_damaged_report_ends_in_one_line_or_is_shown(folder, cases, capsys):
    whole, refused = full_report(folder), 0
    parts = ("segments", "settings", "provenance", "evaluation", "benchmark")
    # the two behind: infinite threads, and a list for the name of a data set
    for seed in (*range(cases), 746, 1780):
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
    """A report with everything in it, and one with next to nothing, of fixed figures."""
    folder = Path(shutil.copytree(saved["dynamic"], tmp_path / "model"))
    fixed, hub = json.loads((GOLDEN / "report_full.json").read_text()), {}
    measured = json.loads((folder / REPORT_NAME).read_text())
    if name == "full":
        measured = full_report(folder)
        base_card = ModelCardData(license="llama2", language="en")
        hub = {"repo_id": "me/llava-tiny-qvlm", "base_card": base_card}
    else:
        versions = fixed["provenance"]["versions"]
        measured["provenance"] = {"base_directory": "llava-tiny", "versions": versions}
    (folder / REPORT_NAME).write_text(json.dumps(measured))
    (folder / CARD_NAME).unlink()
    write_card(folder, **hub)
    golden = GOLDEN / f"model_card_{name}.md"
    assert card(folder) == golden.read_text(), (
        f"if the change is meant: copy the new text to tests/golden/{golden.name}"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipes": []}, ["on 16 samples that were not calibrated on:"]),
        (
            {"recipes": [{"fields": {}, "answer_kl": 1, "text_kl": 2, "keeps_text": False}]},
            [
                "compared 1 recipe,",
                "All of them harmed text, so the one that harmed it least was taken.",
                "on 16 samples that chose the recipe but were not calibrated on:",
            ],
        ),
        (
            {"self_check": {**CHECK, "held_out": False}},
            ["on 16 samples of the calibration itself, which flatters it:"],
        ),
    ],
)
def test_what_is_said_of_recipes_and_of_what_they_were_chosen_on(saved, tmp_path, changes, said):
    folder = Path(shutil.copytree(saved["dynamic"], tmp_path / "model"))
    (folder / REPORT_NAME).write_text(json.dumps(full_report(folder) | changes))
    write_card(folder)
    text = " ".join(card(folder).split())
    for sentence in said:
        assert sentence in text


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


def test_a_band_is_a_block_and_a_point_lies_between_two_layers():
    from matplotlib.figure import Figure

    axes, drawn = Figure().subplots(), segment("language", [1.5, 1.6, 1.9, 1.4, 1.5, 1.6, 1.7])
    _draw_entropies(axes, drawn)
    bands = [(band.get_x() + 0.5, band.get_width()) for band in axes.patches]
    layers = drawn.layers.index
    assert bands == [(layers(block.layers[0]), len(block.layers)) for block in drawn.blocks]
    assert list(axes.lines[0].get_xdata()) == [k + 0.5 for k in range(7)]
