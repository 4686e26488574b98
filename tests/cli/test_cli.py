"""The commands as a user runs them, on a tiny model: output, files, failures."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import save_tiny, save_tiny_samples

from qvlm_hf.cli import inspect, main
from qvlm_hf.cli.evaluate import _names
from qvlm_hf.hub.saved import SavedModel


def files(folder, pattern="*"):
    return {path: path.read_bytes() for path in folder.rglob(pattern) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, samples as a file, and its quantized form."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    save_tiny_samples(folder, 12)
    texts = [json.dumps({"image": None, "question": "what ?", "answer": "red"})] * 3
    (folder / "texts.jsonl").write_text("\n".join(texts))
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    words = "--num-samples 8 --max-block-depth 1 --recipe fixed"
    assert (
        run(folder, "quantize {f}/model --dataset {f}/samples.jsonl --output {f}/w4a4", words) == 0
    )
    return folder


def run(folder, *words, t=""):
    """The exit status of a command line in which {f} is the folder and {t} another."""
    line = " ".join(words).replace("{f}", str(folder)).replace("{t}", str(t))
    return main(shlex.split(line))


def quantization_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# ---- commands that work --------------------------------------------------------------------------


def test_quantize_wrote_model_processor_and_report(folder):
    expected = {"config.json", "model.safetensors", "qvlm_report.json", "tokenizer.json"}
    assert expected <= {file.name for file in (folder / "w4a4").iterdir()}
    config = quantization_config(folder / "w4a4")
    assert config["scheme"] == "W4A4"
    assert config["provenance"]["dataset"] == "samples.jsonl"
    assert str(folder) not in json.dumps(config)


def test_inspect_counts_the_saved_bytes(folder, capsys):
    assert run(folder, "inspect {f}/w4a4") == 0
    printed = capsys.readouterr().out
    assert "entropy D(k, k+1)" in printed
    assert "language 0" in printed
    with safe_open(folder / "w4a4" / "model.safetensors", "pt") as tensors:
        size = sum(tensors.get_tensor(name).nbytes for name in list(tensors.keys()))
    saved = SavedModel(folder / "w4a4")
    assert saved.sizes(torch.float32).total.quantized_bytes == size
    assert str(saved.sizes(torch.float32)) in printed
    assert run(folder, "inspect {f}/w4a4/config.json") == 0
    assert capsys.readouterr().out == printed


def test_inspect_a_shape_beats_the_papers_memory(capsys):
    assert main(["inspect", "--shape", "llava-1.5-13b", "--scheme", "W4A4"]) == 0
    total = capsys.readouterr().out.splitlines()[-1].split()
    assert total[0] == "total"
    assert float(total[-1]) >= 3.5


def test_ask_answers(folder, capsys):
    words = "ask {f}/w4a4 --image {f}/0.png 'what colour is it ?' --max-new-tokens 3"
    assert run(folder, words) == 0
    assert len(capsys.readouterr().out.split()) <= 3
    words = f"ask {{f}}/w4a4 --image {{f}}/0.png '{'red ' * 500}'"
    assert run(folder, words) == 1
    assert "tokens, more than the model's 512 positions: ask" in capsys.readouterr().err


def test_evaluate_against_full_precision(folder, capsys):
    words = "evaluate {f}/w4a4 --dataset {f}/samples.jsonl --against {f}/model"
    assert run(folder, words, "--json {f}/result.json") == 0
    assert "McNemar" in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["comparison"]["answer_kl_nats"] > 0


def test_samples_without_positions_are_left_out_with_counts(folder, tmp_path, caplog, capsys):
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for index, record in enumerate(lines):
        record["question_id"] = index
        part = record["messages"][0]["content"][0]
        part["path"] = str(folder / part["path"])
    # the tiny model has 512 positions
    lines[3]["messages"][0]["content"][1]["text"] = "what " * 600
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "all.jsonl").write_text(json.dumps(lines[3]))
    words = "quantize {f}/model --dataset {t}/long.jsonl --num-samples 12 --max-block-depth 1"
    assert run(folder, words, "--output {t}/out", t=tmp_path) == 0
    assert quantization_config(tmp_path / "out")["provenance"]["samples"] == 11
    noted = [record.getMessage() for record in caplog.records if "samples" in record.name]
    assert noted[0] == f"{tmp_path}/long.jsonl: ignored the keys question_id: they are not needed"
    told = "1 of 12 samples are longer than the model's 512 positions and are left out "
    assert noted[1].startswith(told + "(long.jsonl:4: 6")
    words = "evaluate {f}/model --dataset {t}/long.jsonl --json {t}/r.json"
    assert run(folder, words, t=tmp_path) == 0
    assert json.loads((tmp_path / "r.json").read_text())["accuracy"]["total"] == 11
    capsys.readouterr()
    words = "quantize {f}/model --dataset {t}/all.jsonl --recipe fixed --output {t}/x"
    assert run(folder, words, t=tmp_path) == 1
    told = "qvlm: error: 1 of 1 samples are longer than the model's 512 positions (all.jsonl:1: 6"
    assert capsys.readouterr().err.startswith(told)
    assert not (tmp_path / "x").exists()


def test_rounding_takes_the_options_that_it_has_a_use_for(folder, capsys):
    words = "quantize {f}/model --method rtn --output '{f}/a b/rtn' --seed 5 --rotation hadamard"
    more = "--modules-to-not-convert down_proj lm_head --activation-granularity dynamic_group"
    assert run(folder, words, more) == 0
    assert f"saved in '{folder}/a b/rtn'\n" in capsys.readouterr().out
    saved = quantization_config(folder / "a b" / "rtn")
    assert saved["modules_to_not_convert"] == ["down_proj", "lm_head"]
    assert (saved["rotation"], saved["seed"]) == ("hadamard", 5)
    modules = saved["modules"]
    assert {module["granularity"] for module in modules.values()} == {"dynamic_group"}
    assert not [name for name in modules if "down_proj" in name]


@pytest.mark.parametrize(
    "option",
    [
        "--dataset {f}/samples.jsonl",
        "--num-samples 8",
        "--batch-size 8",
        "--max-block-depth 3",
        "--precision-budget 4",
        "--strict",
    ],
)
def test_options_of_the_search_are_refused_where_there_is_none(folder, capsys, option):
    words, name = f"quantize {{f}}/model --output {{f}}/x {option}", option.split()[0]
    assert run(folder, words, "--method rtn") == 1
    rest = "plain rounding uses no data: leave it out, or leave out --method rtn.\n"
    assert capsys.readouterr().err == f"qvlm: error: {name}: {rest}"
    if name != "--dataset":
        assert run(folder, words, "--scheme W4A16") == 1
        rest = "is of the search, which needs samples: give --dataset F too, or leave it out.\n"
        assert capsys.readouterr().err == f"qvlm: error: {name}: {rest}"
    assert not (folder / "x").exists()


def test_a_model_is_quantized_exported_and_checked(folder, capsys):
    scheme = "quantize {f}/model --scheme W8A8 --group-size -1 --symmetric"
    assert run(folder, scheme, "--method rtn --output {f}/w8a8") == 0
    assert run(folder, "export {f}/w8a8 --output {f}/exported") == 0
    told = "int-quantized: 8 bits, one scale per output, inputs 8 bits per token"
    printed = capsys.readouterr().out
    assert told in printed
    assert printed.endswith(f"saved in {folder}/exported\n")
    assert run(folder, "check {f}/exported --vllm") == 0
    assert "0 errors, 0 notes" in capsys.readouterr().out
    assert run(folder, "check {f}/exported --vllm --tensor-parallel 3") == 1
    told = "language model and 1 more: 4 attention heads are not divided by 3 devices (parallel)"
    assert f"error: {told}" in capsys.readouterr().out
    samples = "--dataset {f}/samples.jsonl --num-samples 4 --max-block-depth 1"
    options = "--activation-granularity dynamic_token --rotation none --output {f}/calibrated"
    assert run(folder, scheme, samples, options) == 0
    assert run(folder, "export {f}/calibrated --output {f}/calibrated-exported") == 0


# ---- commands that fail --------------------------------------------------------------------------

Q = "quantize {f}/model --output {f}/x "
D = "--dataset {f}/samples.jsonl "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (Q + "--dataset {f}/none.jsonl", "no such file"),
        (
            Q,
            "--scheme W4A4 has activation ranges to calibrate: give samples (--dataset "
            "samples.jsonl), or take --activation-granularity dynamic_token or 16-bit activations",
        ),
        (Q + D + "--num-samples 0", "--num-samples 0 must be"),
        (Q + D + "--seed -1", "--seed -1 must be an integer"),
        (
            Q + "--recipe fixed --dataset {f}/texts.jsonl",
            "none of the 3 samples has a picture; add pictures to the dataset, or leave the vision "
            "side alone (--modules-to-not-convert vision_tower multi_modal_projector).",
        ),
        (Q + D + "--scheme W9A4", "is not W"),
        ("quantize {f}/model --output {f}/w4a4 " + D, "exists and is not empty"),
        ("quantize {f}/model --output {f}/samples.jsonl/x " + D, "choose a directory"),
        ("quantize {f}/nowhere --output {f}/x " + D, "nowhere"),
        (
            "quantize {f}/model/config.json --output {f}/x " + D,
            "model/config.json: is a file: name the directory of the model.",
        ),
        ("quantize {f}/w4a4 --method rtn --output {f}/x", "is quantized already"),
        (Q + "--method rtn --activation-granularity channel", "leave it out with --method rtn"),
        (Q + "--method rtn --modules-to-not-convert nose", "'nose' matches no module"),
        ("evaluate {f}/w4a4 --num-samples 0 " + D, "--num-samples 0 must be a whole number"),
        (
            "evaluate {f}/w4a4 --batch-size 0 " + D,
            "--batch-size 0 must be a whole number of at least 1.",
        ),
        (
            "ask {f}/w4a4 --image gone.png 'what ?'",
            "error: --image: no such picture: gone.png; it was looked for in ",
        ),
        ("ask {f}/w4a4 --image {f}/0.png ' '", "error: the question is empty; give text\n"),
        ("ask {f}/bert --image {f}/0.png 'what ?'", "'bert' is no image-text-to-text model"),
        ("ask {f}/w4a4 --image {f}/samples.jsonl 'what ?'", "error: --image: unreadable picture"),
        ("inspect --shape gpt-5", "is unknown"),
        ("inspect {f}/bert", "'bert' is no image-text-to-text model"),
        ("inspect {f}", "no config.json"),
        ("inspect", "either a MODEL or a --shape"),
        ("inspect {f}/w4a4 --group-size 64", "--group-size: is to plan"),
        ("demo --questions none", "must be a number"),
        ("demo --threads 0", "must be at least 1"),
        ("demo --threads 100000", f"is more than the {os.cpu_count()} CPUs here: give "),
        ("export {f}/w4a4 --output {f}/x", "no consumer r"),
        ("export {f}/model --output {f}/x", "is not quantized by qvlm_hf"),
        ("check {f}/w4a4 --vllm", "qvlm export writes what it runs"),
    ],
)
def test_errors_are_one_line_and_status_1(folder, capsys, words, message):
    assert run(folder, words) == 1
    said = capsys.readouterr().err
    assert said.startswith("qvlm: error: ")
    assert message in said
    assert said.count("\n") == 1
    python = r"QVLMConfig|dataset\[|processor=|\b[a-z]+_[a-z_]+=|=(None|True|False)"
    assert not re.search(python, said)
    assert not (folder / "x").exists()


@pytest.mark.parametrize("output", ["source", "link", "above", "data", "pictures", "rtn"])
def test_quantize_never_replaces_what_is_not_its_own(folder, tmp_path, capsys, monkeypatch, output):
    """The source, by a link or above; samples or pictures; an earlier result with a note."""
    source = tmp_path / "above" / "source"
    shutil.copytree(folder / "model", source)
    for name in ("data", "pictures", "rtn"):
        words = f"quantize {source} --method rtn --output {{t}}/{name}"
        assert run(folder, words, t=tmp_path) == 0
    shutil.copytree(tmp_path / "rtn", tmp_path / "above", dirs_exist_ok=True)
    (tmp_path / "link").symlink_to(source)
    for file in folder.glob("*.png"):
        for place in (tmp_path / "data", tmp_path / "pictures" / "images"):
            place.mkdir(exist_ok=True)
            shutil.copy(file, place)
    shutil.copy(folder / "samples.jsonl", tmp_path / "data")
    (tmp_path / "rtn" / "notes.txt").write_text("kept")
    target = source if output == "source" else tmp_path / output
    before = files(tmp_path)
    monkeypatch.setattr(
        "qvlm_hf.cli.quantize.load_processor", lambda *_: pytest.fail("refused too late")
    )
    capsys.readouterr()
    words = f"quantize {source} --dataset {{t}}/data/samples.jsonl --overwrite --output {target}"
    assert run(folder, words, t=tmp_path) == 1
    own = output in ("source", "link")
    error = capsys.readouterr().err
    assert ("holds no earlier result of qvlm_hf that" if own else "wrote like that:") in error
    assert error.count("\n") == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize("command", ["demo", "export {f}/w4a4", "quantize {f}/model --method rtn"])
def test_no_command_replaces_a_full_precision_model(folder, tmp_path, capsys, command):
    shutil.copytree(folder / "model", tmp_path / "model")
    before = files(tmp_path)
    assert run(folder, command, "--overwrite --output {t}/model", t=tmp_path) == 1
    told = f"{tmp_path}/model: holds no earlier result of qvlm_hf that lists its files, so"
    assert told in capsys.readouterr().err
    assert files(tmp_path) == before


def test_quantize_into_the_working_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    for more in ("", "--overwrite"):
        assert run(folder, "quantize {f}/model --method rtn --output .", more) == 0
        assert (tmp_path.stat().st_ino, Path.cwd()) == (inode, tmp_path)
        assert (tmp_path / "config.json").is_file()


@pytest.fixture(scope="module")
def misfits(folder):
    """The model and its quantized form with an old processor: without patch_size."""
    for name in ("model", "w4a4"):
        shutil.copytree(folder / name, folder / f"{name}-old")
        file = folder / f"{name}-old" / "processor_config.json"
        content = json.loads(file.read_text())
        content.pop("patch_size")
        file.write_text(json.dumps(content))
    # an error about weights would come first
    (folder / "w4a4-old" / "model.safetensors").write_bytes(b"broken")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "quantize {f}/model-old --scheme W4A16 --output {f}/x",
        "quantize {f}/model-old --method rtn --output {f}/x",
        "quantize {f}/model-old --output {f}/x " + D,
        *(f"check {{f}}/{name}-old" for name in ("w4a4", "model")),
        *(f"ask {{f}}/{name}-old --image {{f}}/0.png 'what ?'" for name in ("w4a4", "model")),
        *(f"evaluate {{f}}/{name}-old {D}" for name in ("w4a4", "model")),
    ],
)
def test_a_processor_that_does_not_fit_is_one_line_before_any_weight(misfits, capsys, words):
    assert run(misfits, words) == 1
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
    assert run(folder, "evaluate {f}/model --against {t}/other", D, t=tmp_path) == 1
    said = capsys.readouterr().err
    told = "LlavaProcessor writes 16 image tokens, but the model makes 4 features: set"
    assert f"other: a test picture: {told}" in said
    assert said.count("\n") == 1


MISSING = {
    "config.json": "holds no config.json: name the directory of a saved model.",
    "model.safetensors": "holds no model.safetensors: download or quantize the model again.",
    **{
        name: f"holds no processor that loads ({name} is missing): "
        "copy the model's processor files there."
        for name in ("processor_config.json", "tokenizer.json")
    },
    "chat_template.jinja": "LlavaProcessor has no chat template; add chat_template.jinja to its "
    "files, set its chat_template, or take a chat model",
}


@pytest.mark.parametrize("file", MISSING)
@pytest.mark.parametrize(
    "words", ["check {t}/m", "ask {t}/m 'what ?' --image {f}/0.png", "evaluate {t}/m " + D]
)
def test_a_missing_file_is_named_in_one_line(folder, tmp_path, capsys, words, file):
    shutil.copytree(folder / "w4a4", tmp_path / "m")
    (tmp_path / "m" / file).unlink()
    assert run(folder, words, t=tmp_path) == 1
    assert capsys.readouterr().err == f"qvlm: error: {tmp_path}/m: {MISSING[file]}\n"


EMPTIED = [
    *("quantize '' --output O", "quantize MODEL --output ''"),
    *("ask '' 'what ?' --image I", "ask MODEL '' --image I", "ask MODEL 'what ?' --image ''"),
    *("evaluate '' --dataset D", "evaluate MODEL --dataset ''"),
    *("evaluate MODEL --dataset D --against ''", "evaluate MODEL --dataset D --json ''"),
    *("bench '' --json J", "bench MODEL --json ''"),
    *("publish '' me/x", "publish MODEL ''", "publish MODEL me/x --revision ''"),
    *("inspect ''", "export '' --output O", "export MODEL --output ''"),
    *("check ''", "demo --output ''"),
]


@pytest.mark.parametrize("words", EMPTIED)
def test_an_empty_word_is_one_line(tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert run("", words) == 1
    said = capsys.readouterr().err
    names = r"--[a-z]+|MODEL|DIR|REPO|question"
    assert re.fullmatch(rf"qvlm: error: ({names}) is empty: give it a value \(.*\)\.\n", said)
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_directory(folder, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert run("", "export ~/w4a4 --output=~/x") == 1
    assert "no consumer r" in capsys.readouterr().err
    assert run("", "ask ~/w4a4 --image ~/0.png 'what colour ?' --max-new-tokens 3") == 0


def test_an_error_of_another_kind_is_one_line_too(capsys, monkeypatch):
    def fails(_options):
        raise TypeError("of a library:\nwhat it says\nand more")

    monkeypatch.setattr(inspect, "run", fails)
    assert main(["inspect", "x"]) == 1
    told = "unexpected TypeError (of a library: what it says): --debug shows where\n"
    assert capsys.readouterr().err == f"qvlm: error: {told}"
    with pytest.raises(TypeError):
        main(["inspect", "x", "--debug"])


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="is unknown"):
        main(["inspect", "--shape", "gpt-5", "--debug"])


@pytest.mark.parametrize("words", ["", "fly", "ask x", "demo --method magic", "check"])
def test_wrong_usage_is_status_2(words):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2


@pytest.mark.parametrize("words", ["evaluate m --dataset d --wrong 1", "inspect m --wrong 1"])
def test_an_unknown_option_is_answered_by_the_usage_of_its_command(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    said, command = capsys.readouterr().err, words.split()[0]
    assert ended.value.code == 2
    assert said.startswith(f"usage: qvlm {command} [-h] ")
    assert said.endswith(f"qvlm {command}: error: unrecognized arguments: --wrong 1\n")


def test_models_of_one_name_are_told_apart_by_their_paths():
    assert _names("a/m", None) == {"name": "m"}
    assert _names("a/m", "b/n") == {"name": "m", "reference": "n"}
    assert _names("a/m", "b/m") == {"name": "a/m", "reference": "b/m"}
