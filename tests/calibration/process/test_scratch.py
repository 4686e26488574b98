"""Scratch files hold what would grow in memory, and change no bit of a result."""

import gc
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from tiny_calibrations import calibrate, tiny_samples
from tiny_models import save_tiny, tiny_llava, tiny_messages, tiny_processor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from transformers import AutoModelForImageTextToText

import qvlm_hf
from qvlm_hf.calibration.process import scratch as module
from qvlm_hf.calibration.process.scratch import check_scratch_dir, keep, scratch
from qvlm_hf.hf.saving import save_quantized

LARGE = 2**19


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int32])
def test_a_tensor_is_the_same_from_a_file(tmp_path, dtype):
    whole = (torch.rand(700, 900) * 3).to(dtype)
    with scratch(check_scratch_dir(tmp_path)):
        for tensor in (whole, whole.T, whole[100:], whole.view(700, 18, 50).transpose(0, 1)):
            mapped = keep(tensor)
            assert mapped.untyped_storage().filename is not None
            assert mapped.stride() == tensor.stride()
            assert torch.equal(mapped, tensor)
            assert keep(mapped[10:]).data_ptr() == mapped[10:].data_ptr()  # no second file
        assert not list(tmp_path.iterdir())
        descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc").exists() else None
        several = [keep(whole) for _ in range(20)]
        if descriptors:
            assert len(os.listdir("/proc/self/fd")) == descriptors
        assert all(torch.equal(one, whole) for one in several)
    assert keep(whole) is whole


def test_small_tensors_and_tensors_with_holes_stay(tmp_path):
    with scratch(check_scratch_dir(tmp_path)):
        for tensor in (torch.ones(10), torch.ones(800, 900)[:, :850], torch.empty(0, 9)):
            assert keep(tensor) is tensor


def test_a_full_disk_is_one_line(tmp_path):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE, limits[1]))
    try:
        with (
            scratch(check_scratch_dir(tmp_path)),
            pytest.raises(OSError, match=r"cannot be written \(.*\): make room there") as caught,
        ):
            keep(torch.ones(LARGE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_directory_is_made_and_checked(tmp_path, monkeypatch):
    assert check_scratch_dir(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: cannot be written"):
        check_scratch_dir(tmp_path / "file")
    monkeypatch.setattr(module, "_file_system", lambda path: "tmpfs")
    with pytest.raises(ValueError, match=r"lies in memory \(tmpfs\)"):
        check_scratch_dir(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"rotation": "hadamard", "optimize_vision": {"epochs": 1}},
        {"precision_budget": 3.5, "weight_rounding": "nearest", "lm_head_bits": 8},
    ],
    ids=["default", "rotation, vision", "budget, head"],
)
def test_a_calibration_has_the_same_bits(tmp_path, monkeypatch, options):
    monkeypatch.setattr(module, "_SMALL", 1)
    options = {"held_out": tiny_samples(4, seed=9)} | options
    dtype = options.pop("dtype", torch.float32)
    model, report = calibrate(tiny_llava(dtype=dtype), **options)
    with scratch(check_scratch_dir(tmp_path)):
        again, same = calibrate(tiny_llava(dtype=dtype), **options)
    assert same == report
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    mapped = [t for t in second.values() if t.untyped_storage().filename is not None]
    assert len(mapped) > len(first) / 2


def test_saved_files_have_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SMALL", 1)
    source = save_tiny(tmp_path / "full")
    saved = []
    for scratch_dir in (None, tmp_path / "scratch"):
        config = qvlm_hf.QVLMConfig(
            recipe="fixed",
            dataset=tiny_messages(8),
            processor=tiny_processor(),
            group_size=32,
            num_samples=4,
            scratch_dir=scratch_dir,
        )
        model = AutoModelForImageTextToText.from_pretrained(source, quantization_config=config)
        output = tmp_path / str(scratch_dir is None) / "saved"  # a card names its directory
        save_quantized(model, config.processor, output, report=None)
        files = sorted(output.iterdir())
        saved.append([(file.name, file.read_bytes()) for file in files])
    assert saved[0] == saved[1]
    assert not list((tmp_path / "scratch").iterdir())


class HighestMemory:
    """The most bytes of tensors in memory, looked at whenever calibration tells how far it is."""

    bytes = 0

    def __enter__(self):
        """What lies in memory by then does not count, and need not be looked through."""
        gc.collect()
        gc.freeze()
        return self

    def __exit__(self, *_):
        gc.unfreeze()

    def on_step(self, name, done, total):
        del name, done, total
        tensors = [
            each
            for each in gc.get_objects()
            if issubclass(type(each), torch.Tensor)
            and not issubclass(type(each), FakeTensor | FunctionalTensor)
        ]
        storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
        found = {s.data_ptr(): s.nbytes() for s in storages if s.filename is None}
        self.bytes = max(self.bytes, sum(found.values()))


def growth(folder, monkeypatch):
    """Memory that each more layer takes beside its own weights, over those."""
    monkeypatch.setattr(module, "_SMALL", 1)
    taken = []
    for layers in (1, 4):
        with HighestMemory() as highest, scratch(folder):
            model = tiny_llava(text_layers=layers)
            layer = sum(p.nbytes for p in model.get_decoder().layers[0].parameters())
            calibrate(model, tiny_samples(4), max_block_depth=1, callbacks=[highest])
        taken.append(highest.bytes - layers * layer)
    return (taken[1] - taken[0]) / 3 / layer


def test_memory_does_not_grow_with_the_layers(tmp_path, monkeypatch):
    assert growth(check_scratch_dir(tmp_path), monkeypatch) < 0.02
    assert growth(None, monkeypatch) > 1  # so the measure sees what grows
