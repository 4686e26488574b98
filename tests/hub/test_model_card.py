"""The card of a saved directory: golden text, every kind of quantization against the Hub's rules, snippets and commands that run."""

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from safetensors.torch import load_file
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
from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.cli import main
from qvlm_hf.demo import dataset_path, model_dir
from qvlm_hf.hub.card_tables import markdown_table
from qvlm_hf.hub.contents import REPORT_NAME, read_contents, read_report
from qvlm_hf.hub.model_card import CARD_NAME, PICTURE_NAME, check_card, write_card

GOLDEN = Path(__file__).parent.parent / "golden"
SEARCH = {
    "num_samples": 4,
    "batch_size": 2,
    "percentiles": (1.0, 0.999),
    "margins": (),
    "max_block_depth": 2,
}
KINDS = {
    "calibrated": {
        "scheme": "W4A4",
        "dataset": "samples.jsonl",
        "num_samples": 4,
        "batch_size": 2,
        "max_block_depth": 2,
        "group_size": 64,
    },
    "in memory": {"scheme": "W4A8", "dataset": tiny_messages(8, seed=3), **SEARCH},
    "rounded": {"scheme": "W4A16"},
    "rtn": {
        "scheme": "W8A8",
        "activation_granularity": "dynamic_token",
        "group_size": 32,
        "modules_to_not_convert": ["fc1", "down_proj"],
    },
    "dynamic": {
        "scheme": "W3A8",
        "activation_granularity": "dynamic_token",
        "group_size": 32,
        "symmetric": True,
    },
    "budget": {"scheme": "W4A4", "precision_budget": 3.5, "dataset": "samples.jsonl", **SEARCH},
    "no guard": {
        "scheme": "W4A4",
        "guard": False,
        "group_size": -1,
        "dataset": "samples.jsonl",
        **SEARCH,
    },
    "vision": {
        "scheme": "W4A4",
        "optimize_vision": {"epochs": 2},
        "dataset": "samples.jsonl",
        **SEARCH,
    },
    "head": {
        "scheme": "W4A16",
        "lm_head_bits": 8,
        "modules_to_not_convert": ["multi_modal_projector", "layers.0.mlp.fc1"],
    },
    "weights": {"scheme": "W4A16", "dataset": "samples.jsonl", "rotation": "hadamard", **SEARCH},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small are slower on two threads, and a recorded command sets its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def saved(root: Path) -> dict[str, Path]:
    """Kind -> a directory saved by `save_quantized`."""
    return {kind: quantized(root, kind) for kind in KINDS}


def quantized(root: Path, kind: str) -> Path:
    fields = dict(KINDS[kind])
    if fields.get("dataset") == "samples.jsonl":
        fields["dataset"] = root / "samples.jsonl"
    processor = tiny_processor()
    config = QVLMConfig(**fields, processor=processor if "dataset" in fields else None)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(root / "model", quantization_config=config)
    return save_quantized(
        model, processor, root / kind.replace(" ", "-"), report=model.hf_quantizer.report
    )


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next of its rank."""
    rank = title.split(" ")[0]
    (found,) = re.findall(rf"^{re.escape(title)}\n(.*?)(?=^{rank} |\Z)", text, re.S | re.M)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_with_a_sound_card(
    saved: dict[str, Path], root: Path, kind: str
) -> None:
    text = (saved[kind] / CARD_NAME).read_text()
    check_card(text)
    calibrated = "dataset" in KINDS[kind]
    assert (saved[kind] / PICTURE_NAME).exists() == (f"({PICTURE_NAME})" in text) == calibrated
    for file in (CARD_NAME, REPORT_NAME, "config.json"):
        assert str(root) not in (saved[kind] / file).read_text()
    prose = re.sub(r"^```.*?^```|^> .*?$", "", text, flags=re.S | re.M)
    assert not re.search(r"\bNone\b|\bnan\b|Undefined|\{\{|\bTODO\b", prose)
    assert text.endswith("\n")
    assert "\n\n\n" not in text
    data = ModelCard(text).data
    assert data.tags == ["qvlm", KINDS[kind]["scheme"].lower(), "llava"]
    assert data.base_model is None  # a directory is no Hub id
    assert "base_model_relation" not in data.to_dict()
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == [
        "How to load it",
        "What is quantized",
        "Size",
        "Accuracy",
        "Speed",
        "How it was made",
        "Limits",
    ]
    assert all(section(text, f"## {heading}").strip() for heading in headings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_table_is_aligned_and_sums(saved: dict[str, Path], kind: str) -> None:
    text = (saved[kind] / CARD_NAME).read_text()
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.M)
    assert len(tables) >= 4
    for table in tables:
        assert len({len(line) for line in table.splitlines()}) == 1
        assert len({line.count("|") for line in table.splitlines()}) == 1
    shares = [
        float(share)
        for share in re.findall(r"([\d.]+) % \|$", section(text, "## What is quantized"), re.M)
    ]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    modules = read_report(saved[kind]).modules
    assert sum(f"| `{name}` " in text for name in modules) == len(modules)


def test_sizes_are_those_of_the_tensors(saved: dict[str, Path], root: Path) -> None:
    for folder in saved.values():
        contents = read_contents(folder)
        tensors = load_file(folder / "model.safetensors")
        assert contents.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())
        full = load_file(root / "model" / "model.safetensors")
        assert contents.bfloat16_bytes == sum(2 * tensor.numel() for tensor in full.values())


def test_what_was_not_measured_is_said(saved: dict[str, Path]) -> None:
    text = (saved["rounded"] / CARD_NAME).read_text()
    assert "Not measured." in section(text, "## Accuracy")
    assert "qvlm evaluate rounded --dataset test.jsonl --against model --record" in section(
        text, "## Accuracy"
    )
    assert "qvlm bench rounded --against model --record" in section(text, "## Speed")
    assert "Rounded without data, so nothing was compared" in section(text, "## Limits")
    assert "Self-check" not in text
    assert "### Blocks" not in text
    calibrated = (saved["calibrated"] / CARD_NAME).read_text()
    assert "> **Warning:** static ranges from 4 samples clip" in calibrated
    assert "Calibrated on 4 samples" in section(calibrated, "## Limits")
    assert "Self-check after packing, on 4 samples that calibration had not seen" in calibrated


def test_choices_are_told(saved: dict[str, Path]) -> None:
    texts = {kind: (folder / CARD_NAME).read_text() for kind, folder in saved.items()}
    assert "the budget was 3.5" in texts["budget"]
    assert "The guard against modules that few bits break was off." in texts["no guard"]
    assert "per row, rounded" in texts["no guard"]
    assert "Visual encoder optimisation, 2 epochs" in texts["vision"]
    assert re.search(r"\| output head +\| 1 linear module +\| 8 bit ", texts["head"])
    assert (
        "`modules_to_not_convert` was `multi_modal_projector`, `layers.0.mlp.fc1`." in texts["head"]
    )
    assert (
        "Linear modules in float32: `model.vision_tower.encoder.layers.*.mlp.fc1` (1), "
        "`model.multi_modal_projector.linear_1`" in texts["head"]
    )
    assert "a Hadamard rotation folded into the weights" in texts["weights"]
    assert "weights are rounded block by block" in texts["weights"]
    assert "No answer depends on `model.vision_tower.encoder.layers.2`" in texts["calibrated"]


def test_a_model_without_report_says_what_its_config_knows(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(saved["calibrated"])
    folder = save_quantized(loaded, None, tmp_path / "again", report=None)
    assert not (folder / REPORT_NAME).exists()
    text = (folder / CARD_NAME).read_text()
    check_card(text)
    assert "The calibration report was not kept with the model" in text
    assert "calibrated on 4 samples of `samples.jsonl`" in text
    assert "No calibration sample had an answer" not in text
    first, again = (
        section(card, "## What is quantized")
        for card in ((saved["calibrated"] / CARD_NAME).read_text(), text)
    )
    assert first.split("\n\nWeights")[0] == again.split("\n\nWeights")[0]


def test_the_snippet_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(model_dir()), "--scheme", "W8A16", "--output", "demo"]) == 0
    Image.open(dataset_path("test").parent / "images" / "test" / "0001.png").save("picture.png")
    capsys.readouterr()
    (snippet,) = re.findall(
        r"```python\n(.*?)```",
        section(Path("demo", CARD_NAME).read_text(), "## How to load it"),
        re.S,
    )
    exec(
        compile(
            snippet.replace("What is in the picture?", "Which shape is at the top left?"),
            "card",
            "exec",
        ),
        {},
    )
    answer = capsys.readouterr().out.strip()
    first = json.loads(dataset_path("test").read_text().split("\n")[0])
    assert answer in {"circle", "square", "triangle", "cross", "star", "nothing", "diamond"}, (
        answer,
        first,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_makes_the_model_again(
    saved: dict[str, Path], root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    name = saved[kind].name
    language, command = re.findall(
        r"```(\w+)\n(.*?)\n```",
        section((saved[kind] / CARD_NAME).read_text(), "### To repeat it"),
        re.S,
    )[0]
    if language == "bash":
        program, *words = shlex.split(
            command.replace("\\\n", " ").replace(f"--output {name}", f"--output {name}-again")
        )
        assert program == "qvlm"
        assert main([*words, "--overwrite"]) == 0
    else:
        code = command.replace(f'processor, "{name}"', f'processor, "{name}-again"')
        exec(compile(code, "card", "exec"), {"samples": KINDS[kind].get("dataset")})
    first, again = (
        (folder / "model.safetensors").read_bytes()
        for folder in (root / name, root / f"{name}-again")
    )
    assert first == again


def test_both_forms_of_the_command_are_used(saved: dict[str, Path]) -> None:
    texts = {
        kind: section((folder / CARD_NAME).read_text(), "### To repeat it")
        for kind, folder in saved.items()
    }
    assert {kind for kind, text in texts.items() if "```bash" in text} == {
        "calibrated",
        "rounded",
        "rtn",
    }
    assert "dataset=samples" in texts["in memory"]
    assert "`samples` are the calibration samples, which were in memory" in texts["in memory"]


# ---- front matter --------------------------------------------------------------------------------


def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_front_matter_of_a_published_model(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved["calibrated"], tmp_path)
    base_card = ModelCardData(
        license="llama2", language=["en", "fr"], tags=["theirs"], pipeline_tag="image-to-text"
    )
    names = write_card(folder, repo_id="me/tiny-qvlm", base_model="org/tiny", base_card=base_card)
    assert names == (CARD_NAME, PICTURE_NAME)
    text = (folder / CARD_NAME).read_text()
    data = ModelCard(text).data.to_dict()
    assert data == {
        "base_model": "org/tiny", "base_model_relation": "quantized", "language": ["en", "fr"], "library_name": "transformers",
        "license": "llama2", "pipeline_tag": "image-text-to-text", "quantized_by": "me", "repo_id": "me/tiny-qvlm",
        "tags": ["qvlm", "w4a4", "llava"],
    }  # fmt: skip
    assert 'from_pretrained("me/tiny-qvlm")' in text
    assert (
        text.split("---\n")[2]
        .lstrip()
        .startswith(
            "# tiny-qvlm\n\n[org/tiny](https://huggingface.co/org/tiny), quantized to 4-bit weights"
        )
    )
    write_card(folder)  # after a measurement
    assert (folder / CARD_NAME).read_text() == text


def test_licences(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(saved["rounded"], tmp_path)
    theirs = ModelCardData(
        license="other", license_name="their terms", license_link="https://example.org/terms"
    )
    write_card(folder, repo_id="me/a", base_model="org/base", base_card=theirs, author="somebody")
    data = ModelCard((folder / CARD_NAME).read_text()).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == (
        "other",
        "their terms",
        "https://example.org/terms",
    )
    assert data["quantized_by"] == "somebody"
    # what was copied stays when the card is written anew without the base model's card
    write_card(folder)
    assert (
        ModelCard((folder / CARD_NAME).read_text()).data.to_dict()["license_name"] == "their terms"
    )
    write_card(folder, license="mit")
    assert "license_name" not in ModelCard((folder / CARD_NAME).read_text()).data.to_dict()
    # old cards say "other" and nothing else, which the Hub refuses today
    write_card(folder, base_model="org/base", base_card=ModelCardData(license="other"))
    data = ModelCard((folder / CARD_NAME).read_text()).data.to_dict()
    assert (data["license_name"], data["license_link"]) == (
        "license of org/base",
        "https://huggingface.co/org/base",
    )
    before = (folder / CARD_NAME).read_bytes()
    for bad, message in (
        ({"license": "my own"}, "license='my own' is no identifier"),
        ({"base_model": "/tmp/x"}, "base_model='/tmp/x' is no Hub id"),
    ):
        with pytest.raises(ValueError, match=message):
            write_card(folder, **bad)
    assert (folder / CARD_NAME).read_bytes() == before


def test_directories_without_a_model_are_refused(
    tmp_path: Path, root: Path, saved: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=r"has no readable config\.json: name a directory"):
        write_card(tmp_path)
    with pytest.raises(ValueError, match="model: is not quantized by qvlm_hf"):
        write_card(root / "model")
    folder = copied(saved["rounded"], tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors: name the directory"):
        write_card(folder)
    (folder / REPORT_NAME).write_text("{")
    with pytest.raises(
        ValueError, match=rf"{REPORT_NAME}: is no JSON .*: delete it, or quantize the model again"
    ):
        write_card(folder)
    (folder / CARD_NAME).write_text("---\na: [\n---\n")
    (folder / REPORT_NAME).unlink()
    (folder / "model.safetensors").write_bytes(
        (saved["rounded"] / "model.safetensors").read_bytes()
    )
    with pytest.raises(
        ValueError, match=r"README\.md: its front matter cannot be read .*: mend or delete the file"
    ):
        write_card(folder)


def test_cells_cannot_break_a_table() -> None:
    table = markdown_table(("a", "b"), [("x|y", "1\n2"), ("long cell", "3")], right=(1,))
    assert table.splitlines() == [
        "| a         |   b |",
        "| --------- | --: |",
        "| x\\|y      | 1 2 |",
        "| long cell |   3 |",
    ]


# ---- golden --------------------------------------------------------------------------------------


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
    versions = {"python": "3.11.7", "qvlm_hf": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
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
            "samples": 64, "images": 60, "tokens": 4321, "sha256": "ab" * 32, "seed": 0, "threads": 2, "versions": versions,
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
            "accuracy": share, "by_kind": {"colour": share}, "device": "a processor", "threads": 2, "versions": versions,
            "command": "qvlm evaluate llava-tiny-qvlm-w4a4 --dataset test.jsonl --against "
                       "org/llava-tiny --seed 0 --record",
            "comparison": {
                "reference_accuracy": share | {"value": 0.92, "correct": 184}, "both_right": 183, "only_reference": 1, "only_model": 3,
                "both_wrong": 13, "mcnemar_p_value": 0.625, "difference": 0.01, "difference_interval": [-0.016, 0.038],
                "answer_kl_nats": 0.0054, "answer_tokens": 428,
            },
        },
        benchmark={
            "device": "a processor", "device_type": "cpu", "threads": 2, "versions": versions, "together": True,
            "settings": {"rounds": 5, "compile": False, "prompt_tokens": 608, "images": 1, "new_tokens": 32},
            "rows": [row, faster, row | {"way": "a peer", "error": "not installed"}],
            "command": "qvlm bench llava-tiny-qvlm-w4a4 --against org/llava-tiny --record",
        },
    )  # fmt: skip


@pytest.mark.parametrize("name", ["full", "rounded"])
def test_golden(saved: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = copied(saved["dynamic"], tmp_path)
    report = read_report(folder)
    versions = {
        "versions": {
            "python": "3.11.7",
            "qvlm_hf": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
        }
    }
    fixed = (
        full_report(report)
        if name == "full"
        else dataclasses.replace(report, provenance={"base_directory": "llava-tiny", **versions})
    )
    (folder / REPORT_NAME).write_text(json.dumps(fixed.to_dict()))
    assert read_report(folder) == fixed
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
