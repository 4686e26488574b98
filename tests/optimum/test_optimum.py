"""Optimum's doors to the package: its quantizer interface, its pipeline function with and without
`enable`, and `optimum-cli qvlm`.
"""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import optimum.pipelines
import optimum.qvlm
import pytest
import torch
from optimum.commands.base import RootOptimumCLICommand
from optimum.commands.optimum_cli import register_optimum_cli_subcommand
from optimum.commands.register.register_qvlm import QVLMCommand
from optimum.quantization_base import OptimumQuantizer
from tiny_models import tiny_messages
from transformers import AutoModelForImageTextToText

import qvlm_hf
from qvlm_hf.cli import main

load = AutoModelForImageTextToText.from_pretrained

TASK = "image-text-to-text"
QUESTION = tiny_messages(1, seed=5)[0]["messages"][:1]


@pytest.fixture
def enabled():
    optimum.qvlm.enable()
    yield
    optimum.qvlm.disable()


@pytest.fixture
def config():
    return qvlm_hf.QVLMConfig(scheme="W4A16", group_size=32)


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    """A directory made by `QVLMOptimumQuantizer`."""
    quantizer = optimum.qvlm.QVLMOptimumQuantizer.from_pretrained(source)
    return quantizer.quantize(
        tmp_path_factory.mktemp("optimum") / "w4a16",
        config=qvlm_hf.QVLMConfig(scheme="W4A16", group_size=32),
    )


def tokens(pipe):
    (result,) = pipe(text=QUESTION, max_new_tokens=4, return_tensors=True)
    return torch.as_tensor(result["generated_token_ids"]).tolist()


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


# The quantizer


def test_is_optimums_quantizer():
    assert issubclass(optimum.qvlm.QVLMOptimumQuantizer, OptimumQuantizer)


def test_quantizes_as_from_pretrained_does(source, quantized, processor, config, tmp_path):
    model = load(source, quantization_config=config)
    expected = qvlm_hf.save_quantized(
        model, processor, tmp_path / "expected", report=model.hf_quantizer.report
    )
    assert weights(quantized) == weights(expected)
    assert (quantized / "config.json").read_text() == (expected / "config.json").read_text()
    assert {"processor_config.json", "tokenizer.json", "qvlm_report.json"} <= {
        file.name for file in quantized.iterdir()
    }


def test_quantizes_a_model_object_in_place(source, quantized, config, tmp_path):
    model = load(source)
    quantizer = optimum.qvlm.QVLMOptimumQuantizer.from_pretrained(model)
    assert weights(quantizer.quantize(tmp_path / "out", config=config)) == weights(quantized)
    assert model.is_quantized
    with pytest.raises(ValueError, match="the model is quantized already"):
        quantizer.quantize(tmp_path / "again", config=config)


def test_never_replaces_the_full_precision_model(source, config, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    quantizer = optimum.qvlm.QVLMOptimumQuantizer.from_pretrained(tmp_path / "model")
    # found before weights are read
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)
    with pytest.raises(ValueError, match="holds no earlier result of qvlm_hf that lists its files"):
        quantizer.quantize(tmp_path / "model", config=config, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before


def test_a_processor_of_the_configuration_goes_first(source, tmp_path, monkeypatch):
    def load(name, quantization_config):
        raise RuntimeError(quantization_config.processor)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
    beside = optimum.qvlm.QVLMOptimumQuantizer.from_pretrained(source, processor="beside")
    for own, used in (("own", "own"), (None, "beside")):
        with pytest.raises(RuntimeError, match=f"^{used}$"):
            beside.quantize(
                tmp_path / "new", config=qvlm_hf.QVLMConfig(scheme="W4A16", processor=own)
            )


def test_calibrates_with_the_processor_beside_the_model(source, tmp_path):
    search = {"num_samples": 4, "batch_size": 4, "percentiles": (1.0,), "margins": ()}
    search |= {"max_block_depth": 1, "weight_rounding": "nearest", "rotation": None}
    search |= {"guard": False, "token_importance": False}
    config = qvlm_hf.QVLMConfig(recipe="fixed", scheme="W4A8", dataset=tiny_messages(6), **search)
    quantizer = optimum.qvlm.QVLMOptimumQuantizer.from_pretrained(str(source), dtype=torch.float32)
    model = load(quantizer.quantize(tmp_path / "out", config=config))
    assert config.processor is None  # the caller's object stays as it is
    assert model.config.quantization_config.provenance["dataset"] == "list in memory"
    assert model.dtype == torch.float32


def test_what_has_no_meaning_is_refused(source, quantized, config, tmp_path):
    quantizer_class = optimum.qvlm.QVLMOptimumQuantizer
    message = r"^file_name='x' must be None: a checkpoint's files have fixed names\.$"
    with pytest.raises(ValueError, match=message):
        quantizer_class.from_pretrained(source, file_name="x")
    with pytest.raises(ValueError, match=r"^file_prefix='x' must be None"):
        quantizer_class.from_pretrained(source).quantize(
            tmp_path / "out", file_prefix="x", config=config
        )
    with pytest.raises(ValueError, match=r"^the options \['dtype'\] are for loading a model"):
        quantizer_class.from_pretrained(load(source), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^config='W4A16' must be a QVLMConfig"):
        quantizer_class.from_pretrained(source).quantize(tmp_path / "out", config="W4A16")
    with pytest.raises(ValueError, match="has activation ranges to calibrate"):
        quantizer_class.from_pretrained(source).quantize(tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        quantizer_class.from_pretrained(source).quantize(quantized, config=config)
    with (
        pytest.warns(UserWarning, match="already has a"),
        pytest.raises(ValueError, match="is quantized already: give the full"),
    ):
        quantizer_class.from_pretrained(quantized).quantize(tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


# The pipeline


def test_the_signature_is_optimums():
    ours, theirs = (
        inspect.signature(function).parameters.values()
        for function in (optimum.qvlm.pipeline, optimum.pipelines.pipeline)
    )
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]


def test_pipeline_by_directory_object_and_on_the_way_in(source, quantized, processor, config):
    by_directory = optimum.qvlm.pipeline(model=str(quantized))
    by_object = optimum.qvlm.pipeline(TASK, load(quantized), processor=processor)
    options = {"quantization_config": config}
    on_the_way_in = optimum.qvlm.pipeline(
        TASK, str(source), model_kwargs=options, torch_dtype="float32", framework="pt"
    )
    assert tokens(by_directory) == tokens(by_object) == tokens(on_the_way_in)
    assert options == {"quantization_config": config}


def test_pipeline_takes_dtype_device_and_map(quantized):
    assert (
        optimum.qvlm.pipeline(
            model=str(quantized), torch_dtype="bfloat16", device="cpu"
        ).model.dtype
        == torch.bfloat16
    )
    on_cpu = ("lm_head", "model.language_model", "model.multi_modal_projector")
    places = dict.fromkeys(on_cpu, "cpu") | {"model.vision_tower": "disk"}
    split = optimum.qvlm.pipeline(model=str(quantized), device_map=places)
    assert split.model.hf_device_map == places
    assert tokens(split) == tokens(optimum.qvlm.pipeline(model=str(quantized)))


def test_a_pipeline_can_be_saved(source, config, tmp_path):
    """One made by `transformers.pipeline` cannot: its tokenizer has kept the configuration."""
    optimum.qvlm.pipeline(
        model=str(source), model_kwargs={"quantization_config": config}
    ).save_pretrained(tmp_path / "saved")
    assert optimum.qvlm.pipeline(model=str(tmp_path / "saved")).model.is_quantized


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"accelerator": "ort"},
            r"^accelerator='ort' must be 'qvlm' here: optimum\.pipelines\.pipeline has the "
            r"others\.$",
        ),
        ({"task": "fill-mask"}, r"^task='fill-mask' must be 'image-text-to-text'"),
        ({"framework": "tf"}, r"^framework='tf' must be 'pt': quantized models run in PyTorch\.$"),
        (
            {"model": None},
            r"^model=None: there is no default model; give a directory, a Hub id or a model\.$",
        ),
        (
            {},
            r"source\d*: is not quantized with qvlm: give such a checkpoint, or "
            r"model_kwargs=\{'quantization_config': QVLMConfig\(",
        ),
        (
            {"model_kwargs": {"quantization_config": qvlm_hf.QVLMConfig()}},
            r"^scheme='W4A4' has activation ranges to calibrate: [^\n]*$",
        ),
    ],
)
def test_pipeline_errors_are_one_line(source, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        optimum.qvlm.pipeline(**{"task": TASK, "model": str(source)} | arguments)
    assert "\n" not in str(raised.value)


# optimum.pipelines.pipeline, with enable() and without


def test_without_enable_optimum_refuses(quantized):
    with pytest.raises(ValueError, match="Accelerator qvlm not recognized"):
        optimum.pipelines.pipeline(TASK, model=str(quantized), accelerator="qvlm")


def test_with_enable_optimum_takes_it(quantized, enabled):
    by_keyword = optimum.pipelines.pipeline(TASK, model=str(quantized), accelerator="qvlm")
    signature = inspect.signature(optimum.pipelines.pipeline)
    fields = signature.bind(task=TASK, model=str(quantized), accelerator="qvlm")
    fields.apply_defaults()
    by_position = optimum.pipelines.pipeline(*fields.args)
    assert (
        tokens(by_keyword)
        == tokens(by_position)
        == tokens(optimum.qvlm.pipeline(model=str(quantized)))
    )


def test_the_other_accelerators_stay_with_optimum(quantized, enabled):
    with pytest.raises(ValueError, match="Accelerator magic not recognized"):
        optimum.pipelines.pipeline(TASK, model=str(quantized), accelerator="magic")


def test_enable_is_reversible_and_idempotent():
    original = optimum.pipelines.pipeline
    for _ in range(2):
        optimum.qvlm.enable()
    assert optimum.pipelines.pipeline is not original
    assert optimum.pipelines.pipeline.__doc__ == original.__doc__
    assert inspect.signature(optimum.pipelines.pipeline) == inspect.signature(original)
    for _ in range(2):
        optimum.qvlm.disable()
        assert optimum.pipelines.pipeline is original


def test_importing_changes_nothing():
    code = """
import sys
import qvlm_hf
assert not [name for name in sys.modules if name.partition(".")[0] == "optimum"], "qvlm_hf imports optimum"
import optimum.pipelines
original = optimum.pipelines.pipeline
import optimum.qvlm
assert optimum.pipelines.pipeline is original
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# optimum-cli


def optimum_cli(*words):
    """Runs the command through Optimum's own parser and returns its exit status."""
    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    register_optimum_cli_subcommand(QVLMCommand, root)
    options = root.parser.parse_args(["qvlm", *words])
    with pytest.raises(SystemExit) as ended:
        options.func(options).run()
    return ended.value.code


def test_cli_is_the_same_command(source, quantized, tmp_path, capsys):
    words = ["quantize", str(source), "--method", "rtn", "--scheme", "W4A16", "--group-size", "32"]
    assert optimum_cli(*words, "--output", f"{tmp_path}/optimum") == 0
    printed = capsys.readouterr().out
    assert main([*words, "--output", f"{tmp_path}/qvlm"]) == 0
    assert printed == capsys.readouterr().out.replace("/qvlm\n", "/optimum\n")
    assert weights(tmp_path / "optimum") == weights(tmp_path / "qvlm") == weights(quantized)


def test_cli_fails_as_the_same_command(source, tmp_path, capsys):
    assert (
        optimum_cli("quantize", "--output", f"{tmp_path}/out", str(source), "--scheme", "W9A4") == 1
    )
    assert capsys.readouterr().err.startswith("qvlm: error: --scheme W9A4")
    assert optimum_cli("quantize", str(source)) == 2
    assert "required: --output" in capsys.readouterr().err


def test_cli_help_is_the_same(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert optimum_cli("quantize", "--help") == 0
    printed = capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["quantize", "--help"])
    assert ended.value.code == 0
    assert printed == capsys.readouterr().out


@pytest.mark.parametrize("copies", [1, 2])
def test_cli_is_found_and_costs_nothing_until_it_runs(copies, tmp_path):
    """A second copy on the path (a checkout beside an installed one) must not break optimum-cli,
    which reads the folder once per copy.
    """
    if copies == 2:
        (tmp_path / "optimum" / "commands" / "register").mkdir(parents=True)
        module = Path(inspect.getfile(QVLMCommand))
        (tmp_path / "optimum" / "commands" / "register" / module.name).write_text(
            module.read_text()
        )
    code = """
import sys
from optimum.commands.optimum_cli import main
try:
    main()
finally:
    assert not {"torch", "transformers", "qvlm_hf"} & set(sys.modules)
"""
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "qvlm " in done.stdout
