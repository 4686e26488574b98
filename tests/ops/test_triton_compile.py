"""What the compiler makes of the GPU kernels, for devices that are not there: matrix instructions,
no spills, a ceiling on registers.

The tiles of `gpu.TILES` are kept honest here: a product that spills or loses its matrix instruction
is a wrong row of the table.
"""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from qvlm_hf.ops import gpu

TESTS = Path(__file__).parents[1]
CAPABILITIES = (80, 86, 89, 90, 100, 120)
ONE_OFTEN = [
    pytest.param(each, marks=() if each == 90 else pytest.mark.slow) for each in CAPABILITIES
]
# weight bits, activation bits, granularity, tokens
CASES = (
    (4, 4, "channel", 1),
    (8, 8, "dynamic_token", 16),
    (4, 8, "dynamic_token", 608),
    (6, 6, "channel", 608),
    (4, 16, "none", 64),
    (4, 8, "dynamic_token", 1, 4096, 4096, 128, "bfloat16", 3),  # q, k, v
)
# Everything else once: widths, other layouts of groups, dtypes. Arguments after the tokens:
# out_features, in_features, group_length, dtype, modules of one launch.
REST = (
    (8, 8, "channel", 608),
    *((bits, 4, "channel", tokens) for bits in (2, 3, 5, 7, 8) for tokens in (16, 608)),
    *((bits, 8, "token", 608) for bits in (2, 3, 5, 7)),
    *((8, 16, "none", tokens) for tokens in (1, 608)),
    (4, 4, "channel", 32),
    (4, 8, "dynamic_token", 608, 4096, 11008, 11008),
    (4, 8, "dynamic_token", 16, 4096, 11008, 11008),
    (4, 4, "channel", 608, 11008, 4096, 512),
    (4, 4, "channel", 608, 1000, 1000, 64),
    (8, 8, "channel", 608, 4100, 4096, 32),
    (4, 16, "none", 1, 4096, 4096, 128, "float16"),
    *((bits, 8, "dynamic_group", tokens) for bits in (3, 4, 8) for tokens in (1, 608)),
    (4, 8, "dynamic_token", 608, 11008, 4096, 128, "bfloat16", 2),
    (6, 6, "channel", 1, 4096, 4096, 128, "bfloat16", 3),
    (4, 16, "none", 1, 4096, 4096, 128, "bfloat16", 3),
)
# Registers of a thread, by tokens of a tile. 16 tokens: four programs of four warps on a processor.
# 64: one of eight warps, which has 255.
CEILING = {16: 128, 32: 168, 64: 255, 128: 255}
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a program can have

TWO_REGISTERS = 8  # bytes of a thread's stack: what the assembler spills of groups of 512 on 12.0 and of float32 inputs on 8.0
# More of them: of sizes that no tile divides, which no known model has.
SPILLS = {(90, 4, 4, "channel", 608, 1000, 1000, 64): 24}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*words, **environment):
    """What a program prints, in a process in which Triton compiles and does not interpret."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=kept | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(cases, cache):
    """[{kernel: facts}] of the calls."""
    printed = run("compiled_triton.py", json.dumps(cases), TRITON_CACHE_DIR=str(cache))
    return json.loads(printed.splitlines()[-1])


def check(case, kernels, stack=0):
    capability, _, activation_bits, _, tokens = case[:5]
    floating = activation_bits == 16
    warpgroup = capability == 90
    wanted = {
        (False, False): "IMMA",
        (False, True): "IGMMA",
        (True, False): "HMMA",
        (True, True): "HGMMA",
    }[floating, warpgroup]
    product = kernels["_multiply"]
    found = product["instructions"]
    assert found.get(wanted, 0) > 0 or (
        capability == 100 and any(name.startswith("UTC") for name in found)
    ), (case, found)
    for name, facts in kernels.items():
        assert facts["stack"] <= stack, (case, name, facts)
    size = gpu.tile_of(
        gpu.Device(divmod(capability, 10), 100), tokens, torch.bfloat16 if floating else torch.int8
    ).tokens
    assert product["registers"] <= CEILING[size], (case, product["registers"])
    assert product["shared"] <= SHARED[capability] * 1024, (case, product["shared"])


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """A function: a capability's [{kernel: facts}], in the order of CASES."""

    @cache
    def of(capability):
        cases = [(capability, *case) for case in CASES]
        return compiled(cases, tmp_path_factory.mktemp("triton"))

    return of


@pytest.mark.parametrize("capability", ONE_OFTEN)
def test_products_use_matrix_instructions_and_do_not_spill(capability, kernels):
    for case, facts in zip(CASES, kernels(capability), strict=True):
        check((capability, *case), facts)
        assert set(facts) == {"_arrange", "_multiply"}
        # inputs are divided as the reference divides: rounded to nearest, nothing flushed to zero
        if case[1] <= 8:
            assert facts["_arrange"]["divisions"] == ["div.rn.f32"]


def test_a_layer_is_eight_launches_and_little_host_time():
    """Of four inputs and seven modules, at one token; with a driver that launches nothing.

    Beside Triton's way in the same run, and against a ceiling that is three times what was measured.
    """
    found = json.loads(run("launched_triton.py").splitlines()[-1])
    assert found["launches"] == {"_arrange": 4, "_multiply": 4}
    prepared, by_triton = (sum(found[name].values()) for name in ("microseconds", "by_triton"))
    assert prepared < 0.7 * by_triton
    assert prepared / 7 < 60


@pytest.mark.parametrize("capability", ONE_OFTEN)
def test_weights_of_bytes_are_not_taken_apart(capability, kernels):
    """4 bits come out of their bytes by a shift and a mask of whole registers; left to the
    compiler, 56 byte permutations.
    """
    facts = kernels(capability)[CASES.index((4, 4, "channel", 1))]
    assert facts["_multiply"]["instructions"].get("PRMT", 0) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_width_and_layout(capability, tmp_path):
    cases = [(capability, *case) for case in REST]
    for case, kernels in zip(cases, compiled(cases, tmp_path), strict=True):
        check(case, kernels, stack=SPILLS.get(case, TWO_REGISTERS))


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_float32_does_not_spill(capability, tmp_path):
    """float32 inputs are multiplied in float32: no matrix instruction has its precision."""
    cases = [(capability, 4, 16, "none", tokens, 4096, 4096, 128, "float32") for tokens in (1, 608)]
    for case, kernels in zip(cases, compiled(cases, tmp_path), strict=True):
        for name, facts in kernels.items():
            assert facts["stack"] <= TWO_REGISTERS, (case, name, facts)
            assert facts["divisions"] in ([], ["div.rn.f32"]), (case, name, facts)
