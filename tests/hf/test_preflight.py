"""The preflight: told, warned of and refused before a weight is read."""

import logging
import re
import subprocess
import sys

import psutil
import pytest
import torch
from models.test_families import CALIBRATED
from tiny_families import tiny_family, tiny_family_processor
from tiny_models import IMAGE_TOKENS, save_tiny, tiny_messages, tiny_processor
from transformers import AutoConfig, AutoModelForImageTextToText

from qvlm_hf import QVLMConfig
from qvlm_hf.calibration.estimate.seconds import Rates
from qvlm_hf.calibration.options import size_in_bytes
from qvlm_hf.calibration.process import capacity
from qvlm_hf.calibration.samples import load_samples
from qvlm_hf.hf import preflight as module
from qvlm_hf.hf.preflight import check_disk, expect
from qvlm_hf.hub.saved import empty_model


class Silent:
    def on_step(self, name, done, total):
        pass


SLOW = Rates(single=1e8, native=1e8, values=1e7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    return save_tiny(folder / "model")


@pytest.fixture
def unread(folder, monkeypatch):
    """Loads the model; nothing of it is read."""

    def fails(*_args, **_kwargs):
        raise AssertionError("a weight was read")

    def load(**fields):
        config = QVLMConfig(
            recipe="fixed", dataset=tiny_messages(4), processor=tiny_processor(), **fields
        )
        return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)

    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", fails)
    return load


def test_samples_are_counted(folder):
    model, config = empty_model(AutoConfig.from_pretrained(folder)), QVLMConfig()
    config.processor = tiny_processor()
    counted = expect(model, config, load_samples(tiny_messages(4)))
    assert counted.data.samples == 4
    assert counted.data.tokens["vision"] == IMAGE_TOKENS
    assert counted.data.tokens["projector"] == IMAGE_TOKENS
    assert counted.data.tokens["language"] > IMAGE_TOKENS
    assumed = expect(model, config)
    assert assumed.data.samples == 64
    assert assumed.data.tokens["vision"] == IMAGE_TOKENS
    fixed = sum(expect(model, QVLMConfig(recipe="fixed")).seconds.values())
    assert 1.2 < sum(assumed.seconds.values()) / fixed < 2  # at most twice the time is promised


def test_a_long_run_says_what_it_takes(unread, monkeypatch, capsys):
    monkeypatch.setattr(module, "measure_rates", lambda *_: SLOW)
    with pytest.raises(AssertionError, match="a weight was read"):
        unread()
    told = capsys.readouterr().err
    assert told.startswith("qvlm expects ")
    assert " MB of disk for the result\n" in told
    with pytest.raises(AssertionError, match="a weight was read"):
        unread(callbacks=[Silent()])
    assert capsys.readouterr().err == ""


def test_what_cannot_fit_is_refused_before_a_weight_is_read(unread, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "whole_memory", lambda _: 10**8)
    message = r"this process may have 0.1 GB: .*, max_block_depth=1, num_s"
    with pytest.raises(ValueError, match=message):
        unread()
    with pytest.raises(ValueError, match=r"may have 0.1 GB: take a machine with more\.$"):
        unread(max_block_depth=1, num_samples=16, scratch_dir=tmp_path)


def test_a_full_disk_is_refused_before_a_weight_is_read(unread, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "free_disk", lambda _: 1000)
    with pytest.raises(ValueError, match=r"no room for .* are free: make room"):
        unread(resume_dir=tmp_path / "state")
    with pytest.raises(ValueError, match=r"no room for .* of scratch files, 0.0 MB are free"):
        unread(scratch_dir=tmp_path / "scratch")


def test_each_directory_needs_room_for_what_it_keeps(folder, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        module, "check_disk", lambda size, place, what: asked.update({what: (size, place)})
    )
    model, processor = empty_model(AutoConfig.from_pretrained(folder)), tiny_processor()
    state, scratch = str(tmp_path / "state"), str(tmp_path / "scratch")
    config = QVLMConfig(processor=processor, resume_dir=state, scratch_dir=scratch)
    expected = expect(model, config)
    module.preflight(model, config, None)
    assert asked == {
        "steps to resume from": (expected.kept, state),
        "scratch files": (expected.held.kept, scratch),
    }
    assert expected.memory == expected.held.working
    assert expect(model, QVLMConfig(processor=processor)).memory == expected.held.together


@pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu", {"": "cpu"}, None])
def test_any_device_map_is_understood(folder, device_map):
    config = QVLMConfig(scheme="W4A16")
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=config, device_map=device_map
    )
    assert model.hf_quantizer.report.modules


def test_what_others_hold_is_a_warning(unread, monkeypatch, caplog):
    monkeypatch.setattr(module, "free_memory", lambda _: 10**8)
    with caplog.at_level(logging.WARNING), pytest.raises(AssertionError, match="was read"):
        unread()
    assert "0.1 GB are free: end other programs, or take" in caplog.text


def test_a_result_is_as_large_as_was_said(folder, tmp_path):
    config = QVLMConfig(scheme="W4A16")
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    empty = empty_model(AutoConfig.from_pretrained(folder)).to(torch.float32)
    assert expect(empty, config).result == pytest.approx(size, rel=0.1)  # and a header


def smallest(model, config):
    """The size that a refusal of a smaller one names."""
    with pytest.raises(ValueError, match="is below ") as error:
        expect(model, config)
    return re.search(r"is below ([\d.]+[MG]B), which the model takes", str(error.value))[1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"activation_granularity": "dynamic_token"},
        {"activation_granularity": "channel", "symmetric": True},
        {"activation_granularity": "dynamic_token", "rotation": "hadamard"},
        {"scheme": "W4A16"},
    ],
)
def test_the_smallest_budget_is_that_of_the_calibration(tmp_path, tied, options):
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    options = {"recipe": "fixed", "guard": False, "max_block_depth": 1, **options}
    options |= {"token_importance": False, "weight_rounding": "nearest"}
    empty = empty_model(AutoConfig.from_pretrained(folder)).to(torch.float32)
    enough = smallest(empty, QVLMConfig(precision_budget="0.01MB", **options))
    config = QVLMConfig(
        precision_budget=enough, dataset=tiny_messages(4), processor=tiny_processor(), **options
    )
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    # hundredths of a megabyte, and headers
    assert file.stat().st_size <= size_in_bytes(enough) < file.stat().st_size + 20_000


def test_a_budget_must_do_for_every_recipe_that_may_be_taken(folder):
    empty = empty_model(AutoConfig.from_pretrained(folder))
    budget = {"precision_budget": "0.01MB"}
    fixed = {"recipe": "fixed", "rotation": None, **budget}
    ranges = [None, "dynamic_group", "channel"]
    searched, dynamic, static = (
        size_in_bytes(smallest(empty, QVLMConfig(activation_granularity=one, **fixed)))
        for one in ranges
    )
    assert dynamic < searched == static
    assert size_in_bytes(smallest(empty, QVLMConfig(**budget))) == searched
    chosen = QVLMConfig(activation_granularity="dynamic_group", **budget)
    assert size_in_bytes(smallest(empty, chosen)) == dynamic


def test_a_budget_is_no_larger_than_the_result_can_be(folder):
    empty = empty_model(AutoConfig.from_pretrained(folder)).to(torch.float32)
    sizes = {
        budget: expect(empty, QVLMConfig(precision_budget=budget, group_size=32)).result
        for budget in (2.5, 3.5, 8, "100GB", "0.3MB")
    }
    assert sizes["0.3MB"] == 300_000
    assert sizes[2.5] < sizes[3.5] < sizes[8]
    assert sizes["100GB"] == pytest.approx(sizes[8], rel=0.2)  # with static ranges and headers
    plain = expect(empty, QVLMConfig(scheme="W8A8", group_size=32)).result
    assert sizes[8] == pytest.approx(plain)


def test_limits_of_control_groups_count(tmp_path, monkeypatch):
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text("3000000\n")
    (tmp_path / "a" / "memory.current").write_text("1000000\n")
    (tmp_path / "a" / "memory.stat").write_text("anon 1\ninactive_file 400000\n")
    (group / "memory.max").write_text("max\n")
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    monkeypatch.setattr(capacity, "_CGROUPS", tmp_path)
    monkeypatch.setattr(capacity, "_OWN", tmp_path / "cgroup")
    assert capacity.whole_memory() == 3000000
    assert capacity.free_memory() == 2400000
    (tmp_path / "cgroup").write_text("0::/elsewhere\n")
    assert capacity.whole_memory() == (psutil.virtual_memory().total + psutil.swap_memory().total)


LIMITED = """
import resource, sys
from qvlm_hf.calibration.process.capacity import free_memory, whole_memory
kind, most = getattr(resource, sys.argv[1]), 6 * 10**9
resource.setrlimit(kind, (most, most))
assert most / 2 < whole_memory() <= most, whole_memory()
assert free_memory() <= 1.01 * whole_memory()
assert abs(whole_memory() - whole_memory(mapped=10**9) - 10**9) < 10**7
assert whole_memory(mapped=10**10) == 0
"""


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="Linux tells them")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_count(limit):
    """`ulimit -v` and `ulimit -d`: what is reserved, and files that are mapped, count."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, limit], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_a_directory_to_be_made_lies_on_the_disk_of_the_next_above(tmp_path):
    assert capacity.free_disk(tmp_path / "a" / "b") == pytest.approx(
        capacity.free_disk(tmp_path), rel=0.1
    )
    check_disk(1, str(tmp_path / "a" / "b"), "the result")


@pytest.mark.parametrize("family", dict.fromkeys(one[0] for one in CALIBRATED))
def test_every_family_is_counted(family):
    """The tokens of its pictures are those that its own processor and tower make."""
    combination = next(one for one in CALIBRATED if one[0] == family)
    model, processor = tiny_family(*combination), tiny_family_processor(*combination[:2])
    found = expect(
        model.to("meta"),
        QVLMConfig(processor=processor, scheme="W4A8"),  # whose first choice is to rotate
        load_samples(tiny_messages(2)),
    )
    tokens = found.data.tokens
    assert all(count > 0 for count in tokens.values())
    if family != "got_ocr2":  # whose projector starts with a convolution over channels
        assert tokens["vision"] >= tokens["projector"]
    if family not in ("got_ocr2", "mllama"):  # which reads pictures beside the text
        assert tokens["language"] > tokens["projector"]


def test_a_gpu_without_room_is_refused(folder, monkeypatch):
    model = empty_model(AutoConfig.from_pretrained(folder))
    expected = expect(model, QVLMConfig(processor=tiny_processor()))
    assert expected.device - expected.weights == expected.held.together
    half = expect(model.to(torch.bfloat16), QVLMConfig(processor=tiny_processor()))
    assert half.weights < half.device < half.weights + half.held.together
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1e12, 2e12))
    assert module.check_memory(expected, gpu) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1e3, 2e12))
    assert "end other programs" in module.check_memory(expected, gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1e3, 1e6))
    with pytest.raises(ValueError, match=r"1\.0 MB: take a machine with more"):
        module.check_memory(expected, gpu)


@pytest.mark.parametrize(
    ("device_map", "devices"),
    [
        (None, ["cpu"]),
        ({"": "cpu"}, ["cpu"]),
        ({"a": 0, "b": "disk", "c": "cpu"}, ["cuda:0"]),
        ({"a": 1, "b": "cuda:0"}, ["cuda:0", "cuda:1"]),
    ],
)
def test_where_layers_will_lie(device_map, devices):
    assert list(map(str, module._devices(device_map))) == devices
