"""GPU kernels where there is no GPU: Triton's interpreter runs them in a process of its own, and
nothing else needs Triton.

Speed and what the compiler makes of them: test_triton_compile.py; on a device: tests/gpu.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qvlm_hf.ops import gpu
from qvlm_hf.ops.call import CallScheme, Packed, has_format

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_under_the_interpreter():
    """Everything in interpreted_kernels.py.

    Whoever imports triton first chooses for the whole process whether it interprets.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    # -P: the package that the other tests import, not the tree's where another one is installed
    command = [sys.executable, "-P", "-m", "pytest", "--no-cov", "-q", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--import-mode=importlib", "tests/ops/interpreted_kernels.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_what_does_not_run_is_named():
    with pytest.raises(RuntimeError, match=r"no kernels for compute capability 7\.5"):
        gpu._load(gpu.Device((7, 5), 40))
    scheme = CallScheme(None, None, 2**16, 8, 8, 2**16, "channel", 0)
    assert gpu.misfit(scheme) == f"a sum over {2**16} inputs can leave int32"
    assert gpu.misfit(scheme._replace(activation_bits=16, granularity="none")) is None
    grouped = scheme._replace(group_length=256, granularity="dynamic_group")
    assert gpu.misfit(grouped) == "no GPU kernel has a range per group of more than 128 inputs"
    assert gpu.misfit(grouped._replace(group_length=128)) is None
    assert (
        gpu.misfit(grouped._replace(granularity="new")) == "no GPU kernel knows granularity 'new'"
    )


def test_kernels_take_no_tensors_of_two_devices():
    """The kernel that the dispatcher picks reads addresses: one tensor elsewhere is a crash."""
    weight, scale = torch.empty(8, 8, dtype=torch.int32), torch.empty(8, 1, dtype=torch.bfloat16)
    scheme = CallScheme(None, None, 64, 4, 8, 64, "dynamic_token", 0)
    x = torch.empty(1, 64)
    assert has_format(x, [Packed(weight, scale, None, None)], scheme)
    for elsewhere in (
        Packed(weight.to("meta"), scale, None, None),
        Packed(weight, scale.to("meta"), None, None),
    ):
        assert not has_format(x, [elsewhere], scheme)
    assert not has_format(x.to("meta"), [Packed(weight, scale, None, None)], scheme)


def test_triton_is_imported_only_where_it_is_used():
    """Importing the package must neither import it nor need it."""
    code = """
import sys
if sys.argv[1] == "absent":
    sys.modules["triton"] = None
import qvlm_hf
from qvlm_hf.ops import gpu
assert sys.modules.get("triton") is None
if sys.argv[1] == "absent":
    try:
        gpu._load(gpu.Device((9, 0), 1))
    except RuntimeError as error:
        assert str(error) == "triton is not installed"
    else:
        raise AssertionError
"""
    for state in ("present", "absent"):
        done = subprocess.run([sys.executable, "-c", code, state], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


HELP = """
import contextlib, io, json, runpy, sys
sys.path.insert(0, "tests/gpu")
imports, programs = json.loads(sys.argv[1])
exec(imports, {})
printed = {}
for program in programs:
    sys.argv = [program, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        if program == "qvlm_hf":
            sys.argv = [program, "bench", "--help"]
            runpy.run_module(program, run_name="__main__")
        else:
            runpy.run_path(program, run_name="__main__")
    printed[program] = page.getvalue()
print(json.dumps(printed))
"""


def test_programs_of_the_run_on_a_gpu_are_there_and_know_their_options():
    """Nobody sees the next rename otherwise, before a device is paid for."""
    script = (ROOT / "tests" / "gpu" / "run.sh").read_text()
    alive = re.search(r"<<'ALIVE'\n(.*?)^ALIVE$", script, re.DOTALL | re.MULTILINE)[1]
    imports = "\n".join(re.findall(r"^(?:import|from) .*", alive, re.MULTILINE))
    programs = {}
    for body in re.findall(r"^\w+\(\) \{(.*?)^\}$", script, re.DOTALL | re.MULTILINE):
        lines = "\n".join(line for line in body.splitlines() if "nvidia-smi" not in line)
        if found := re.search(r"python3 (?:-m )?(tests/gpu/\w+\.py|qvlm_hf)", lines):
            dry = {"--dry"} if '"${dry[@]}"' in lines else set()
            programs[found[1]] = dry | set(re.findall(r"(?<=[ (])--[a-z-]+", lines))
    assert len(programs) == 6
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "tests", "tests/ops"))
    command = [sys.executable, "-c", HELP, json.dumps([imports, list(programs)])]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    pages = json.loads(done.stdout.splitlines()[-1])
    for program, options in programs.items():
        assert all(option in pages[program] for option in options), (program, options)


def test_the_run_on_a_gpu_is_two_calls_of_limited_seconds():
    """Parts of tests/gpu/run.sh, and what each may take: a lent device has 15 minutes."""
    script = (ROOT / "tests" / "gpu" / "run.sh").read_text()
    calls = re.search(r"^first=\((.*)\) second=\((.*)\)$", script, re.MULTILINE)
    limits = re.search(r"^declare -A seconds=\((.*)\)$", script, re.MULTILINE)
    seconds = {name: int(n) for name, n in re.findall(r"\[(\w+)\]=(\d+)", limits[1])}
    sums = [sum(seconds[name] for name in names.split()) for names in calls.groups()]
    assert sums == [480, 230]
    assert all(re.search(rf"^{name}\(\) {{", script, re.MULTILINE) for name in seconds)
    command = ["bash", str(ROOT / "tests" / "gpu" / "run.sh"), "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no part is called 'nothing'" in done.stderr
