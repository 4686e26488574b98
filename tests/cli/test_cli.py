"""The commands as a user runs them, on a tiny model: what they print, what they write, how they fail."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import save_tiny, tiny_messages

from qvlm_hf.cli import main

GOLDEN = Path(__file__).parent.parent / "golden"
COMMANDS = (
    "demo",
    "quantize",
    "ask",
    "evaluate",
    "bench",
    "publish",
    "inspect",
    "export",
    "check",
    "autoload",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, samples as a file, and its quantized form."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    lines = []
    for index, record in enumerate(tiny_messages(12, seed=3)):
        for message in record["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    part.pop("image", part.pop("path", None)) if not isinstance(
                        part.get("image"), Image.Image
                    ) else part.pop("image").save(folder / f"{index}.png")
                    part["path"] = f"{index}.png"
        lines.append(json.dumps(record))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    texts = [json.dumps({"image": None, "question": "what ?", "answer": "red"})] * 3
    (folder / "texts.jsonl").write_text("\n".join(texts))
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    arguments = [
        "quantize",
        f"{folder}/model",
        "--dataset",
        f"{folder}/samples.jsonl",
        "--output",
        f"{folder}/w4a4",
    ]
    assert main([*arguments, "--num-samples", "8", "--max-block-depth", "1"]) == 0
    return folder


def test_quantize_wrote_model_processor_and_report(folder):
    assert {"config.json", "model.safetensors", "qvlm_report.json", "tokenizer.json"} <= {
        file.name for file in (folder / "w4a4").iterdir()
    }
    config = json.loads((folder / "w4a4" / "config.json").read_text())["quantization_config"]
    assert config["scheme"] == "W4A4"
    assert config["provenance"]["dataset"] == "samples.jsonl"
    assert str(folder) not in json.dumps(config)


def test_inspect_counts_the_saved_bytes(folder, capsys):
    from safetensors import safe_open

    assert main(["inspect", f"{folder}/w4a4"]) == 0
    printed = capsys.readouterr().out
    assert "entropy D(k, k+1)" in printed
    assert "language 0" in printed
    from qvlm_hf.cli.inspect import saved_footprint

    with safe_open(folder / "w4a4" / "model.safetensors", "pt") as tensors:
        size = sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118 - safe_open is no dict
    assert saved_footprint(str(folder / "w4a4"))[1].total.quantized_bytes == size


def test_inspect_a_shape_beats_the_papers_memory(capsys):
    assert main(["inspect", "--shape", "llava-1.5-13b", "--scheme", "W4A4"]) == 0
    total = capsys.readouterr().out.splitlines()[-1].split()
    assert total[0] == "total"
    assert float(total[-1]) >= 3.5


def test_ask_answers(folder, capsys):
    assert (
        main(
            [
                "ask",
                f"{folder}/w4a4",
                "--image",
                f"{folder}/0.png",
                "what colour is it ?",
                "--max-new-tokens",
                "3",
            ]
        )
        == 0
    )
    assert len(capsys.readouterr().out.split()) <= 3


def test_evaluate_against_full_precision(folder, capsys):
    arguments = [
        "evaluate",
        f"{folder}/w4a4",
        "--dataset",
        f"{folder}/samples.jsonl",
        "--against",
        f"{folder}/model",
    ]
    assert main([*arguments, "--json", f"{folder}/result.json"]) == 0
    assert "McNemar" in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["comparison"]["answer_kl_nats"] > 0


def test_samples_without_positions_are_left_out_with_counts(folder, tmp_path, caplog, capsys):
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for index, record in enumerate(lines):
        record["question_id"] = index
        part = record["messages"][0]["content"][0]
        part["path"] = str(folder / part["path"])
    lines[3]["messages"][0]["content"][1]["text"] = (
        "what " * 600
    )  # the tiny model has 512 positions
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = [
        "quantize",
        f"{folder}/model",
        "--dataset",
        f"{tmp_path}/long.jsonl",
        "--output",
        f"{tmp_path}/out",
    ]
    assert main([*arguments, "--num-samples", "12", "--max-block-depth", "1"]) == 0
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert saved["provenance"]["samples"] == 11
    noted = [record.getMessage() for record in caplog.records if "samples" in record.name]
    assert noted[0] == f"{tmp_path}/long.jsonl: ignored the keys question_id: they are not needed"
    assert noted[1].startswith(
        "1 of 12 samples are longer than the model's 512 positions and are left out (long.jsonl:4: "
        "6"
    )
    assert (
        main(
            [
                "evaluate",
                f"{folder}/model",
                "--dataset",
                f"{tmp_path}/long.jsonl",
                "--json",
                f"{tmp_path}/r.json",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "r.json").read_text())["accuracy"]["total"] == 11
    (tmp_path / "all.jsonl").write_text(json.dumps(lines[3]))
    capsys.readouterr()
    assert (
        main([*arguments[:2], "--dataset", f"{tmp_path}/all.jsonl", "--output", f"{tmp_path}/x"])
        == 1
    )
    expected = (
        "qvlm: error: 1 of 1 samples are longer than the model's 512 positions (all.jsonl:1: 6"
    )
    assert capsys.readouterr().err.startswith(expected)
    assert not (tmp_path / "x").exists()


def test_rounding_needs_no_data(folder, capsys):
    assert (
        main(["quantize", f"{folder}/model", "--method", "rtn", "--output", f"{folder}/rtn"]) == 0
    )
    assert "saved in rtn" in capsys.readouterr().out


def test_rounding_takes_the_options_that_it_has_a_use_for(folder):
    arguments = [
        "quantize",
        f"{folder}/model",
        "--method",
        "rtn",
        "--output",
        f"{folder}/rtn-options",
        "--seed",
        "5",
    ]
    options = [
        "--modules-to-not-convert",
        "down_proj",
        "lm_head",
        "--rotation",
        "hadamard",
        "--activation-granularity",
        "dynamic_token",
    ]
    assert main([*arguments, *options]) == 0
    saved = json.loads((folder / "rtn-options" / "config.json").read_text())["quantization_config"]
    assert (saved["modules_to_not_convert"], saved["rotation"], saved["seed"]) == (
        ["down_proj", "lm_head"],
        "hadamard",
        5,
    )
    assert saved["modules"]
    assert not [name for name in saved["modules"] if "down_proj" in name]


@pytest.mark.parametrize(
    "option",
    [
        ["--dataset", "{f}/samples.jsonl"],
        ["--num-samples", "8"],
        ["--batch-size", "8"],
        ["--max-block-depth", "3"],
        ["--precision-budget", "4"],
        ["--strict"],
    ],
    ids=lambda option: option[0],
)
def test_options_of_the_search_are_refused_where_there_is_none(folder, capsys, option):
    words = [
        "quantize",
        f"{folder}/model",
        "--output",
        f"{folder}/x",
        *(word.replace("{f}", str(folder)) for word in option),
    ]
    assert main([*words, "--method", "rtn"]) == 1
    expected = f"qvlm: error: {option[0]}: plain rounding uses no data: leave it out, or leave out --method rtn.\n"
    assert capsys.readouterr().err == expected
    if option[0] != "--dataset":
        assert main([*words, "--scheme", "W4A16"]) == 1
        expected = f"qvlm: error: {option[0]}: is of the search, which needs samples: give --dataset F too, or leave it out.\n"
        assert capsys.readouterr().err == expected
    assert not (folder / "x").exists()


def test_a_model_is_quantized_exported_and_checked(folder, capsys):
    scheme = ["--scheme", "W8A8", "--group-size", "-1", "--symmetric", "--method", "rtn"]
    assert main(["quantize", f"{folder}/model", *scheme, "--output", f"{folder}/w8a8"]) == 0
    assert main(["export", f"{folder}/w8a8", "--output", f"{folder}/exported"]) == 0
    assert (
        "int-quantized: 8 bits, one scale per output, inputs 8 bits per token"
        in capsys.readouterr().out
    )
    assert main(["check", f"{folder}/exported", "--vllm"]) == 0
    assert "0 errors, 0 notes" in capsys.readouterr().out
    assert main(["check", f"{folder}/exported", "--vllm", "--tensor-parallel", "3"]) == 1
    assert (
        "error: language model and 1 more: 4 attention heads are not divided by 3 devices "
        "(parallel)" in capsys.readouterr().out
    )


def test_a_calibrated_w8a8_can_be_made_for_export(folder):
    arguments = [
        "--scheme",
        "W8A8",
        "--group-size",
        "-1",
        "--symmetric",
        "--activation-granularity",
        "dynamic_token",
        "--rotation",
        "none",
    ]
    samples = [
        "--dataset",
        f"{folder}/samples.jsonl",
        "--num-samples",
        "4",
        "--max-block-depth",
        "1",
    ]
    assert (
        main(
            [
                "quantize",
                f"{folder}/model",
                *arguments,
                *samples,
                "--output",
                f"{folder}/calibrated",
            ]
        )
        == 0
    )
    assert (
        main(["export", f"{folder}/calibrated", "--output", f"{folder}/calibrated-exported"]) == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["quantize", "{f}/model", "--dataset", "{f}/none.jsonl", "--output", "{f}/x"],
            "no such file",
        ),
        (
            ["quantize", "{f}/model", "--output", "{f}/x"],
            "--scheme W4A4 has activation ranges to calibrate: give samples (--dataset "
            "samples.jsonl), or take "
            "--activation-granularity dynamic_token or 16-bit activations",
        ),
        (
            [
                "quantize",
                "{f}/model",
                "--dataset",
                "{f}/samples.jsonl",
                "--output",
                "{f}/x",
                "--num-samples",
                "0",
            ],
            "--num-samples 0 must be",
        ),
        (
            [
                "quantize",
                "{f}/model",
                "--dataset",
                "{f}/samples.jsonl",
                "--output",
                "{f}/x",
                "--seed",
                "-1",
            ],
            "--seed -1 must be an integer",
        ),
        (
            ["quantize", "{f}/model", "--dataset", "{f}/texts.jsonl", "--output", "{f}/x"],
            "none of the 3 samples has a picture; add pictures to the dataset, or leave the vision "
            "side alone "
            "(--modules-to-not-convert vision_tower multi_modal_projector).",
        ),
        (
            ["evaluate", "{f}/w4a4", "--dataset", "{f}/samples.jsonl", "--num-samples", "0"],
            "--num-samples 0 must be a whole number",
        ),
        (
            ["evaluate", "{f}/w4a4", "--dataset", "{f}/samples.jsonl", "--batch-size", "0"],
            "--batch-size 0 must be a whole number of at least 1.",
        ),
        (
            ["ask", "{f}/w4a4", "--image", "gone.png", "what ?"],
            "error: --image: no such picture: gone.png; it was looked for in ",
        ),
        (
            ["ask", "{f}/w4a4", "--image", "{f}/0.png", " "],
            "error: the question is empty; give text\n",
        ),
        (
            [
                "quantize",
                "{f}/model",
                "--dataset",
                "{f}/samples.jsonl",
                "--output",
                "{f}/x",
                "--scheme",
                "W9A4",
            ],
            "is not W",
        ),
        (
            ["quantize", "{f}/model", "--dataset", "{f}/samples.jsonl", "--output", "{f}/w4a4"],
            "exists and is not empty",
        ),
        (
            ["quantize", "{f}/nowhere", "--dataset", "{f}/samples.jsonl", "--output", "{f}/x"],
            "nowhere",
        ),
        (["quantize", "{f}/w4a4", "--method", "rtn", "--output", "{f}/x"], "is quantized already"),
        (
            [
                "quantize",
                "{f}/model",
                "--method",
                "rtn",
                "--output",
                "{f}/x",
                "--activation-granularity",
                "channel",
            ],
            "leave it out with --method rtn",
        ),
        (
            [
                "quantize",
                "{f}/model",
                "--method",
                "rtn",
                "--output",
                "{f}/x",
                "--modules-to-not-convert",
                "nose",
            ],
            "'nose' matches no module",
        ),
        (
            ["ask", "{f}/bert", "--image", "{f}/0.png", "what ?"],
            "'bert' is no image-text-to-text model",
        ),
        (
            [
                "quantize",
                "{f}/model",
                "--dataset",
                "{f}/samples.jsonl",
                "--output",
                "{f}/samples.jsonl/x",
            ],
            "choose a directory",
        ),
        (["inspect", "--shape", "gpt-5"], "is unknown"),
        (["inspect", "{f}/model"], "is not quantized"),
        (["inspect", "{f}"], "no config.json"),
        (["inspect"], "either a directory or a --shape"),
        (["inspect", "{f}/w4a4", "--group-size", "64"], "--group-size: is for --shape"),
        (
            ["ask", "{f}/w4a4", "--image", "{f}/samples.jsonl", "what ?"],
            "error: --image: unreadable picture",
        ),
        (["demo", "--questions", "none"], "must be a number"),
        (["demo", "--threads", "0"], "must be at least 1"),
        (
            ["export", "{f}/w4a4", "--output", "{f}/x"],
            "no consumer r",
        ),
        (["export", "{f}/model", "--output", "{f}/x"], "is not quantized by qvlm_hf"),
        (["check", "{f}/w4a4", "--vllm"], "qvlm export writes what it runs"),
    ],
)
def test_errors_are_one_line_and_status_1(folder, capsys, arguments, message):
    assert main([word.replace("{f}", str(folder)) for word in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("qvlm: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not re.search(
        r"QVLMConfig|dataset\[|processor=|\b[a-z]+_[a-z_]+=|=(None|True|False)", captured.err
    )
    assert not (folder / "x").exists()


@pytest.mark.parametrize("output", ["source", "link", "above", "data", "pictures", "rtn"])
def test_quantize_never_replaces_what_is_not_its_own(folder, tmp_path, capsys, monkeypatch, output):
    """The source, also by a link; what holds the source, the samples or their pictures; an earlier result with a note."""
    source = tmp_path / "above" / "source"
    shutil.copytree(folder / "model", source)
    for name in ("data", "pictures", "rtn"):
        assert (
            main(["quantize", str(source), "--method", "rtn", "--output", f"{tmp_path}/{name}"])
            == 0
        )
    shutil.copytree(tmp_path / "rtn", tmp_path / "above", dirs_exist_ok=True)
    (tmp_path / "link").symlink_to(source)
    for file in folder.glob("*.png"):
        for place in (tmp_path / "data", tmp_path / "pictures" / "images"):
            place.mkdir(exist_ok=True)
            shutil.copy(file, place)
    shutil.copy(folder / "samples.jsonl", tmp_path / "data")
    (tmp_path / "rtn" / "notes.txt").write_text("kept")
    target = source if output == "source" else tmp_path / output
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(
        "qvlm_hf.cli.quantize.load_processor", lambda *_: pytest.fail("refused too late")
    )
    capsys.readouterr()
    arguments = [
        "quantize",
        str(source),
        "--dataset",
        f"{tmp_path}/data/samples.jsonl",
        "--overwrite",
        "--output",
        str(target),
    ]
    assert main(arguments) == 1
    why = (
        "holds no earlier result of qvlm_hf that"
        if output in ("source", "link")
        else "wrote like that:"
    )
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["demo", "export {f}/w4a4", "quantize {f}/model --method rtn"])
def test_no_command_replaces_a_full_precision_model(folder, tmp_path, capsys, monkeypatch, command):
    shutil.copytree(folder / "model", tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    words = command.replace("{f}", str(folder)).split()
    assert main([*words, "--overwrite", "--output", f"{tmp_path}/model"]) == 1
    assert (
        f"{tmp_path}/model: holds no earlier result of qvlm_hf that lists its files, so"
        in capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_quantize_into_the_working_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    for more in ([], ["--overwrite"]):
        assert main(["quantize", f"{folder}/model", "--method", "rtn", "--output", ".", *more]) == 0
        assert (tmp_path.stat().st_ino, Path.cwd()) == (inode, tmp_path)
        assert (tmp_path / "config.json").is_file()


@pytest.fixture(scope="module")
def misfits(folder):
    """The model, and its quantized form, with a processor as old repositories have it: without patch_size."""
    for name in ("model", "w4a4"):
        shutil.copytree(folder / name, folder / f"{name}-old")
        file = folder / f"{name}-old" / "processor_config.json"
        file.write_text(
            json.dumps(
                {
                    key: value
                    for key, value in json.loads(file.read_text()).items()
                    if key != "patch_size"
                }
            )
        )
    (folder / "w4a4-old" / "model.safetensors").write_bytes(
        b"broken"
    )  # an error about anything else came first
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "{f}/model-old", "--scheme", "W4A16", "--output", "{f}/x"],
        ["quantize", "{f}/model-old", "--method", "rtn", "--output", "{f}/x"],
        ["quantize", "{f}/model-old", "--dataset", "{f}/samples.jsonl", "--output", "{f}/x"],
        ["check", "{f}/w4a4-old"],
        ["check", "{f}/model-old"],
        ["ask", "{f}/w4a4-old", "--image", "{f}/0.png", "what ?"],
        ["ask", "{f}/model-old", "--image", "{f}/0.png", "what ?"],
        ["evaluate", "{f}/w4a4-old", "--dataset", "{f}/samples.jsonl"],
        ["evaluate", "{f}/model-old", "--dataset", "{f}/samples.jsonl"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_a_processor_that_does_not_fit_is_one_line_before_any_weight(misfits, capsys, arguments):
    assert main([word.replace("{f}", str(misfits)) for word in arguments]) == 1
    said = capsys.readouterr().err.replace(str(misfits), "F")
    assert re.fullmatch(
        r"qvlm: error: ((F/(model|w4a4)-old: )?a test picture|samples.jsonl:\d+): LlavaProcessor "
        r"refuses this batch \(.*\): "
        r'set "patch_size": 8 in the model\'s processor_config.json, or the same on the '
        r"processor\.\n",
        said,
    )


def test_against_another_processor_is_refused_before_its_weights(folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["vision_config"]["patch_size"] = 16
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    (tmp_path / "other" / "model.safetensors").write_bytes(b"broken")
    arguments = [
        "evaluate",
        f"{folder}/model",
        "--dataset",
        f"{folder}/samples.jsonl",
        "--against",
        f"{tmp_path}/other",
    ]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert (
        "other: a test picture: LlavaProcessor writes 16 image tokens, but the model makes 4 "
        "features: set" in said
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "holds no config.json: name the directory of a saved model."),
        ("model.safetensors", "holds no model.safetensors: download or quantize the model again."),
        *(
            (
                name,
                f"holds no processor that loads ({name} is missing): copy the model's processor "
                f"files there.",
            )
            for name in ("processor_config.json", "tokenizer.json")
        ),
        (
            "chat_template.jinja",
            "LlavaProcessor has no chat template; add chat_template.jinja to its files, set its "
            "chat_template, or take a chat model",
        ),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["check"],
        ["ask", "what ?", "--image", "{f}/0.png"],
        ["evaluate", "--dataset", "{f}/samples.jsonl"],
    ],
)
def test_a_missing_file_is_named_in_one_line(folder, tmp_path, capsys, command, file, message):
    shutil.copytree(folder / "w4a4", tmp_path / "m")
    (tmp_path / "m" / file).unlink()
    name, *rest = (word.replace("{f}", str(folder)) for word in command)
    assert main([name, f"{tmp_path}/m", *rest]) == 1
    assert capsys.readouterr().err == f"qvlm: error: {tmp_path}/m: {message}\n"


WORDS = {
    "quantize": ["MODEL", "--output", "O"],
    "ask": ["MODEL", "what ?", "--image", "I"],
    "evaluate": ["MODEL", "--dataset", "D", "--against", "A", "--json", "J"],
    "bench": ["MODEL", "--json", "J"],
    "publish": ["MODEL", "me/x", "--revision", "R"],
    "inspect": ["MODEL"],
    "export": ["MODEL", "--output", "O"],
    "check": ["MODEL"],
    "demo": ["--output", "O"],
}


@pytest.mark.parametrize(
    ("command", "place"),
    [(name, i) for name, words in WORDS.items() for i, w in enumerate(words) if w[0] != "-"],
)
def test_an_empty_word_is_one_line(tmp_path, capsys, monkeypatch, command, place):
    monkeypatch.chdir(tmp_path)
    words = [*WORDS[command][:place], "", *WORDS[command][place + 1 :]]
    assert main([command, *words]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"qvlm: error: (--[a-z]+|MODEL|DIR|REPO|question) is empty: give it a value \(.*\)\.\n",
        said,
    )
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_kind_is_one_line_too(folder, capsys, monkeypatch):
    from qvlm_hf.cli import inspect

    def fails(_options):
        raise TypeError("of a library:\nwhat it says\nand more")

    monkeypatch.setattr(inspect, "run", fails)
    assert main(["inspect", "x"]) == 1
    expected = (
        "qvlm: error: unexpected TypeError (of a library: what it says): --debug shows where\n"
    )
    assert capsys.readouterr().err == expected
    with pytest.raises(TypeError):
        main(["inspect", "x", "--debug"])


def test_debug_shows_the_traceback(folder):
    with pytest.raises(ValueError, match="is unknown"):
        main(["inspect", "--shape", "gpt-5", "--debug"])


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["ask", "x"], ["demo", "--method", "magic"], ["check"]]
)
def test_wrong_usage_is_status_2(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_pinned(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == (GOLDEN / f"cli_help_{command}.txt").read_text()
