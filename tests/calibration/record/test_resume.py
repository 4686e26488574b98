"""A calibration that is stopped goes on in its directory, in its own alone."""

import errno
from dataclasses import replace

import pytest
import torch
from tiny_calibrations import calibrate, tiny_samples
from tiny_models import tiny_llava

from qvlm_hf.calibration.record import inputs_hash, resume
from qvlm_hf.calibration.record.report import BlockReport
from qvlm_hf.calibration.record.resume import SavedSteps, alone_in, check_resume_dir, remove_state
from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.format.grids import QParams

HELD_OUT = {"held_out": tiny_samples(4, seed=9)}
# together they take every step that is kept, once at least
RECIPES = {
    "default": {"max_block_depth": 1},
    "budget, vision": {"precision_budget": 3.5, "optimize_vision": {"epochs": 1}},
    "recipes": {
        "recipe": "auto",
        "rotation": None,
        "activation_granularity": "channel",
        "max_block_depth": 1,
        "percentiles": (1.0,),
    },
    "nearest": {"weight_rounding": "nearest", "activation_granularity": {"vision": "token"}},
}


def stop_after(monkeypatch, steps):
    """Ctrl-C when so many steps are on the disk."""
    write, left = SavedSteps.write, [steps]

    def counted(self, step, value):
        write(self, step, value)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(SavedSteps, "write", counted)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in RECIPES), ("default", torch.bfloat16)]
)
def test_a_stopped_calibration_ends_as_an_undisturbed_one(name, dtype, tmp_path, monkeypatch):
    options = HELD_OUT | RECIPES[name]
    model, report = calibrate(tiny_llava(dtype=dtype).eval(), **options)
    for steps in (5, 4):
        stop_after(monkeypatch, steps)
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny_llava(dtype=dtype).eval(), resume_dir=tmp_path, **options)
        monkeypatch.undo()
    again, same = calibrate(tiny_llava(dtype=dtype).eval(), resume_dir=tmp_path, **options)
    assert same == report
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A directory with all steps of a calibration."""
    folder = tmp_path_factory.mktemp("begun")
    calibrate(resume_dir=folder, max_block_depth=1)
    return folder


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model": tiny_llava(seed=1)}, "another model"),
        ({"data": tiny_samples(8, seed=5)}, "other samples"),
        ({"held_out": tiny_samples(2, seed=5)}, "other samples"),
        ({"group_size": 16}, "group_size 32 instead of 16"),
        ({"entropy_threshold": 0.5}, "entropy_threshold none instead of 0.5"),
    ],
)
def test_another_calibration_is_refused_in_one_line(begun, other, said):
    other = {"max_block_depth": 1} | other
    model = other.pop("model", None)
    with pytest.raises(ValueError, match=f"was begun with {said}: go on as it was begun") as caught:
        calibrate(model and model.eval(), resume_dir=begun, **other)
    assert "\n" not in str(caught.value)


def test_other_versions_threads_and_processors_are_refused(begun, monkeypatch):
    made_from = inputs_hash.made_from

    def origin(**changes):
        return lambda *given: made_from(*given) | changes

    for change, said in (
        ({"threads": 99}, "threads [0-9]+ instead of 99"),
        ({"inputs": "0"}, "another processor"),
        ({"versions": {"torch": "1.0"}}, "instead of 1.0"),
    ):
        monkeypatch.setattr("qvlm_hf.quantize.made_from", origin(**change))
        with pytest.raises(ValueError, match=said):
            calibrate(resume_dir=begun, max_block_depth=1)


@pytest.mark.parametrize("name", ["block-0-0.json", "block-0-0.safetensors", "state.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    calibrate(resume_dir=tmp_path, max_block_depth=1)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name}: is damaged: delete .* to begin"):
        calibrate(resume_dir=tmp_path, max_block_depth=1)


def test_two_at_once_in_one_directory(tmp_path):
    with alone_in(tmp_path), pytest.raises(ValueError, match="another calibration is running in"):
        calibrate(resume_dir=tmp_path, max_block_depth=1)
    assert not list(tmp_path.iterdir())
    with alone_in(tmp_path):  # which is free again
        pass


def test_a_full_disk_keeps_earlier_steps(tmp_path, monkeypatch):
    model, files = tiny_llava().eval(), []

    def full(tensors, path):
        if "block" in path.name:
            files.extend(sorted(file.name for file in tmp_path.iterdir()))
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    save_file = resume.save_file
    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\): make room"):
        calibrate(model, resume_dir=tmp_path, max_block_depth=1)
    assert "importance.json" in files
    assert {"importance.json", "state.json"} <= {file.name for file in tmp_path.iterdir()}
    monkeypatch.undo()
    calibrate(model, resume_dir=tmp_path, max_block_depth=1)  # it is as it was


def test_a_calibration_that_finished_no_step_binds_nobody(tmp_path):
    with pytest.raises(ValueError, match="matches no module"):
        calibrate(resume_dir=tmp_path, modules_to_not_convert=["nothing"])
    calibrate(resume_dir=tmp_path, max_block_depth=1)


def test_every_kind_of_value_comes_back(tmp_path):
    value = {
        "a": [1, 2.5, None, True, "x", float("inf")],
        "b": (QParams(torch.rand(3, 1), torch.ones(3, 1, dtype=torch.int32), 4), ()),
        3: {"block": BlockReport(layers=("l",), initial=0.1, greedy=0.2, joint=0.3, evaluations=4)},
        "c": RangeCandidate(granularity="channel", margin=1.1),
        "d": torch.rand(4, 4).bfloat16().T,
    }
    steps = SavedSteps(tmp_path, {})
    assert steps.once("step", lambda: value) is value
    found = SavedSteps(tmp_path, {}).once("step", lambda: pytest.fail("it is there"))
    assert found.keys() == value.keys()
    assert found["a"] == value["a"]
    assert torch.equal(found["b"][0].scale, value["b"][0].scale)
    assert found["b"][0].zero_point.dtype == torch.int32
    assert found["b"][1] == ()
    assert found[3] == value[3]
    assert found["c"] == replace(value["c"])
    assert torch.equal(found["d"], value["d"])


def test_a_file_makes_no_other_object(tmp_path):
    SavedSteps(tmp_path, {})
    for name in ("Path", "SavedSteps", "CalibrationReport"):
        (tmp_path / "step.json").write_text(f'{{"class": "{name}", "fields": {{}}}}')
        with pytest.raises(ValueError, match="is damaged"):
            SavedSteps(tmp_path, {}).read("step")


def test_only_what_is_ours_is_used_and_removed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: choose a directory"):
        check_resume_dir(tmp_path / "file")
    with pytest.raises(ValueError, match="holds something else than a stopped calibration"):
        check_resume_dir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="loop: is a link to itself: choose a directory"):
        check_resume_dir(tmp_path / "loop")
    (tmp_path / "below").symlink_to("file/below")
    with pytest.raises(ValueError, match="below: cannot be written: choose a directory"):
        check_resume_dir(tmp_path / "below")
    (tmp_path / "dangling").symlink_to("a/b")  # what it names can be made
    folder = check_resume_dir(tmp_path / "dangling")
    assert folder == tmp_path / "a" / "b"
    assert not folder.parent.exists()
    SavedSteps(folder, {}).write("step", (torch.ones(1),))
    check_resume_dir(folder)
    (folder / "notes.txt").touch()
    remove_state(folder)
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
    remove_state(folder)
    (folder / "notes.txt").unlink()
    SavedSteps(folder, {}).write("step", 1)
    remove_state(folder)
    assert not folder.exists()


@pytest.mark.parametrize(("processes", "kept"), [(1, True), (2, False)])
def test_what_differs_between_processes_is_not_kept(processes, kept, tmp_path, monkeypatch):
    steps = SavedSteps(tmp_path, {})
    monkeypatch.setattr(resume.ranks, "world_size", lambda: processes)
    assert steps.once("importance", lambda: 5, of_own_data=True) == 5
    assert (tmp_path / "importance.json").exists() == kept
