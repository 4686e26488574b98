"""`qvlm autoload` in a new environment: programs load quantized models, nothing else changes."""

import importlib
import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.quantizers import auto

import qvlm_hf
from qvlm_hf.calibration.samples import load_samples
from qvlm_hf.cli import autoload, main
from qvlm_hf.demo import dataset_path, model_dir
from qvlm_hf.hf import autoload_hook

HERE = Path(__file__).parent
# Would let the tests' own environment in.
BEFORE = {"PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONUSERBASE"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in BEFORE}
REACHABLE = [str(Path(qvlm_hf.__file__).parents[1]), *site.getsitepackages()]

# Several commands in one process: importing is most of their time.
COMMANDS = """
import sys
from qvlm_hf.cli import main
for command in sys.argv[1:]:
    print("status", main(["autoload", *command.split()]), flush=True)
"""


class Environment:
    """A virtual environment without pip that sees the packages of the one that runs the tests."""

    def __init__(self, folder):
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = str(folder / "bin" / "python")
        (self.packages,) = (folder / "lib").glob("python*/site-packages")
        (self.packages / "zz_packages.pth").write_text("\n".join(REACHABLE))
        self.pth = self.packages / autoload.PTH_NAME

    def run(self, *arguments):
        words, place = (
            [self.python, *map(str, arguments)],
            {"env": ENVIRONMENT, "cwd": self.packages},
        )
        return subprocess.run(words, **place, capture_output=True, text=True)

    def commands(self, *commands):
        done = self.run("-c", COMMANDS, *commands)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), done.stderr.splitlines()


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


@pytest.fixture
def installed(environment):
    environment.pth.write_text(autoload.pth_text())
    return environment


def test_programs_load_quantized_models_without_importing_qvlm_hf(tmp_path, installed):
    config = qvlm_hf.QVLMConfig(scheme="W4A16")
    model = AutoModelForImageTextToText.from_pretrained(model_dir(), quantization_config=config)
    processor = AutoProcessor.from_pretrained(model_dir())
    qvlm_hf.save_quantized(model, processor, tmp_path / "w4a16", report=model.hf_quantizer.report)
    sample = load_samples(dataset_path("test"), num_samples=1, seed=0)[0]
    picture, question = sample.messages[0]["content"]
    program = [HERE / "fresh_autoload.py", tmp_path / "w4a16", picture["image"], question["text"]]

    done = installed.run(*program)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    text = processor.apply_chat_template(list(sample.messages[:1]), add_generation_prompt=True)
    inputs = processor(text=text, images=str(picture["image"]), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1]
    assert found["spared"] is True
    assert found["method"] == "qvlm"
    assert torch.equal(torch.tensor(found["logits"]), expected.float())
    assert found["answer"] == sample.answer

    installed.pth.unlink()
    done = installed.run(*program)
    assert done.returncode == 1
    # weights do not fit: no wrong answers
    assert done.stderr.splitlines()[-1].startswith("RuntimeError")


def test_install_status_and_remove(environment):
    environment.pth.write_text("# the hook of an older version, without effect\nimport sys\n")
    commands = ("status", "install", "remove", "remove", "status", "install --user")
    out, err = environment.commands(*commands)
    refused = out.pop(1)
    assert refused.startswith("does not work: ValueError: Unknown quantization type, got qvlm")
    absent = f"not installed in {environment.packages}"
    assert out == [
        f"installed: {environment.pth}, from another version: run qvlm autoload install",
        "status 1",
        f"installed: {environment.pth}",
        "works: programs load quantized models without importing qvlm_hf",
        "status 0",
        *(f"removed {environment.pth}", "status 0"),
        *(absent, "status 0"),
        *(absent, "status 1"),
        "status 1",
    ]
    told = "this Python reads no user directory, as in every virtual environment: leave --user out."
    assert err == [f"qvlm: error: --user: {told}"]
    assert not [name for name in os.listdir(environment.packages) if "autoload" in name]


def test_a_directory_that_may_not_be_written_is_one_line(environment):
    environment.packages.chmod(0o555)
    # root may write everywhere, so the process becomes somebody else before it tries
    code = """
import os, sys, sysconfig
from qvlm_hf.cli import autoload, main
# what the other may not be allowed to read
text = autoload.pth_text()
autoload.pth_text = lambda: text
sysconfig.get_paths()
os.geteuid() or os.setuid(65534)
sys.exit(main(["autoload", "install"]))
"""
    done = environment.run("-c", code)
    environment.packages.chmod(0o755)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    told = "may not be written (Permission denied): use an environment of your own, or --user."
    assert told in done.stderr
    assert not environment.pth.exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not (site.check_enableusersite() or sys.prefix != sys.base_prefix),
    reason="user directories are switched off",
)
def test_the_users_directory(tmp_path):
    reachable = os.pathsep.join(REACHABLE)
    variables = ENVIRONMENT | {"PYTHONUSERBASE": str(tmp_path), "PYTHONPATH": reachable}
    command = [sys._base_executable, "-c", COMMANDS, "install --user", "remove --user"]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed, works, status, removed, last = done.stdout.splitlines()
    assert installed.startswith(f"installed: {tmp_path}")
    assert works.startswith("works")
    assert removed == installed.replace("installed:", "removed")
    assert (status, last) == ("status 0", "status 0")


# ---- what the hook does to other programs: nothing -----------------------------------------------


def modules_at_start(environment, *options):
    """Whether a finder of ours is there, and the modules that were imported."""
    code = """
import sys
found = any(getattr(finder, "__name__", "") == "QVLMFinder" for finder in sys.meta_path)
print(found, *sorted(sys.modules))
"""
    done = environment.run(*options, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    found, *modules = done.stdout.split()
    return found == "True", modules


def test_a_start_gets_a_finder_and_no_module(installed):
    found, modules = modules_at_start(installed)
    assert found
    assert modules_at_start(installed, "-I")[0]
    assert not modules_at_start(installed, "-S")[0]  # no site-packages, no autoload
    installed.pth.unlink()
    assert modules_at_start(installed) == (False, modules)


def test_without_qvlm_hf_nothing_happens(installed):
    code = """
import sys
sys.modules["qvlm_hf"] = None  # as if it were not installed
from transformers.quantizers import auto
assert "qvlm" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
"""
    done = installed.run("-W", "error:qvlm", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A module in place of Transformers' table; the file's line runs twice, as in environments."""
    (tmp_path / "some_table.py").write_text("AUTO_QUANTIZATION_CONFIG_MAPPING = {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for _ in range(2):
        exec(autoload.pth_text().replace(autoload_hook.TABLE, "some_table"))
    yield "some_table"
    sys.modules.pop("some_table", None)


def entry():
    return importlib.import_module("some_table").AUTO_QUANTIZATION_CONFIG_MAPPING["qvlm"]


def test_the_entry_becomes_a_configuration_when_one_is_read(table):
    assert entry().__name__ == "Promise"
    config = entry().from_dict({"quant_method": "qvlm", "scheme": "W8A16"})
    assert isinstance(config, qvlm_hf.QVLMConfig)
    assert config.scheme == "W8A16"


def test_a_look_without_an_import_and_a_reload_are_survived(table):
    assert importlib.util.find_spec(table).origin.endswith("some_table.py")
    first = entry()
    importlib.reload(sys.modules[table])  # empties the table
    assert entry() is not first


def test_a_module_that_is_missing_is_missing_as_ever(table, tmp_path):
    (tmp_path / "some_table.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="No module named 'some_table'"):
        entry()


def test_what_qvlm_hf_entered_stays():
    assert auto.__name__ == autoload_hook.TABLE
    autoload_hook.teach(auto)
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["qvlm"] is qvlm_hf.QVLMConfig


def test_a_transformers_without_the_table_is_one_warning(table, tmp_path):
    (tmp_path / "some_table.py").write_text("OTHER = {}\n")
    with pytest.warns(UserWarning, match="qvlm autoload does not fit this Transformers") as warned:
        importlib.import_module(table)
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)


def test_the_file_is_ascii_and_one_line_of_code():
    text = autoload.pth_text()
    remark, line, end = text.split("\n")
    assert text.isascii()
    assert remark.startswith("#")
    assert line.startswith("import sys; ")  # what makes Python execute a line of a .pth file
    assert end == ""


def test_the_directory_is_that_of_this_python(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    assert main(["autoload", "remove"]) == 0
    assert capsys.readouterr().out == f"not installed in {tmp_path / 'purelib'}\n"
