"""Calls of `qvlm_hf::linear` and `linears`: random arguments, other forms of them, wrong numbers."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from qvlm_hf.format.packing import pack
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.ops.call import numbers_of
from qvlm_hf.ops.linear import kernel_name, linear

OPS = torch.ops.qvlm_hf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATIC = ("channel", "token")
GRANULARITIES = ("channel", "token", "dynamic_token", "dynamic_group", "none")
TIGHT = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
NO_COMPILER = "no C++ compiler found: install g++ or set CXX"
has_compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no compiler")


def remove_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)  # PEFT's BOFT leaves gcc in it
    monkeypatch.setattr(shutil, "which", lambda _: None)


# Place in `arguments`, a number that no module has, and the words for it.
IMPOSSIBLE = (
    *(
        (7, bits, f"weight_bits={bits} must be an integer from 2 to 8.")
        for bits in (-1, 0, 1, 9, 12, 64, 2**32)
    ),
    *(
        (8, bits, f"activation_bits={bits} must be an integer from 3 to 8, or 16")
        for bits in (-1, 0, 2, 9, 64, 2**32)
    ),
    (8, 16, "granularity='channel' does not go with activation_bits=16"),
    *(
        (9, length, f"group_length={length} must be from 1 to in_features=64, ")
        for length in (-32, 0, 65, 2**62)
    ),
    *((6, size, f"in_features={size} must be at least 1.") for size in (-64, 0)),
    (10, "other", f"granularity='other' must be one of {', '.join(GRANULARITIES)}."),
    (10, "none", "granularity='none' does not go with activation_bits=4"),
    *(
        (11, block, f"hadamard={block} must be None or a power of two from 2 to 4096.")
        for block in (-4, 1, 3)
    ),
    (11, 128, "a Hadamard block of 128 must be a power of two that divides 64."),
)


def arguments(
    weight_bits,
    activation_bits,
    granularity,
    out_features,
    in_features,
    group_length,
    positions,
    symmetric=False,
    dtype=torch.float32,
    seed=0,
):
    """Random flat arguments of `linear`, besides its input."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_length)
    statics = {"channel": in_features, "token": positions}.get(granularity)
    integers = torch.randint(
        0, 2**weight_bits, (out_features, in_features), generator=generator, dtype=torch.uint8
    )
    zero_point = torch.randint(
        0, 2**weight_bits, (out_features, groups), generator=generator, dtype=torch.uint8
    )
    return (
        pack(integers, weight_bits),
        ((torch.rand(out_features, groups, generator=generator) + 0.5) / 2 ** (weight_bits + activation_bits)).bfloat16(),
        None if symmetric else zero_point,
        None if statics is None else torch.rand(statics, generator=generator) * 8 / 2**activation_bits + 0.01,
        None if statics is None else torch.randint(0, 2**activation_bits, (statics,), generator=generator, dtype=torch.int32),
        torch.randn(out_features, generator=generator).to(dtype),
        in_features, weight_bits, 16 if granularity == "none" else activation_bits, group_length, granularity, 0,
    )  # fmt: skip


def lists(*calls):
    """Flat arguments of `linears` from those of `linear` for each module; the input's are the
    first's.
    """
    first, own = calls[0], zip(*((*one[:3], one[5]) for one in calls), strict=True)
    weight, scale, zero_point, bias = ([t for t in part if t is not None] for part in own)
    return weight, scale, zero_point, *first[3:5], bias, *first[6:]


OWN = ("weight", "weight_scale", "weight_zero_point")
NAMES = (*OWN, "input_scale", "input_zero_point", "bias")


def door(call):
    """Arguments of `ops.linear.linear` besides the input: tensors by name, in_features and scheme."""
    in_features, weight_bits, activation_bits, length, granularity, hadamard = call[6:]
    scheme = QuantScheme(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        group_size=length if length < in_features else -1,
        symmetric=call[2] is None,
        granularity=granularity,
        hadamard=hadamard or None,
    )
    return dict(zip(NAMES, call[:6], strict=True)), in_features, scheme


@dataclass(frozen=True)
class Case:
    """An input and the tensors of one module; `integers` is its weight before packing."""

    x: torch.Tensor
    integers: torch.Tensor
    tensors: dict[str, torch.Tensor | None]
    scheme: QuantScheme

    def changed(self, **tensors):
        """The same with other tensors of the module."""
        return replace(self, tensors=self.tensors | tensors)

    @property
    def call(self):
        """Arguments of the doors."""
        return self.x, self.tensors, self.integers.shape[1], self.scheme

    @property
    def flat(self):
        """Arguments of the operator `linear`."""
        tensors = (self.tensors[name] for name in NAMES)
        return self.x, *tensors, *numbers_of(self.integers.shape[1], self.scheme)


def make_case(
    granularity,
    weight_bits=4,
    activation_bits=4,
    *,
    shape=(2, 3, 21),
    out_features=3,
    group_size=8,
    symmetric=False,
    bias=True,
    dtype=torch.float32,
    hadamard=None,
    scaled_input=False,
):
    """Random tensors; the activation grid covers about 80 % of the input, so both ends are clipped."""
    scheme = QuantScheme(
        weight_bits=weight_bits,
        activation_bits=16 if granularity == "none" else activation_bits,
        group_size=group_size,
        symmetric=symmetric,
        granularity=granularity,
        hadamard=hadamard,
    )
    in_features, top = shape[-1], 2**scheme.activation_bits - 1
    groups = scheme.groups(in_features)
    # Multiples of 1/64: their sums are exact, so that a Hadamard matrix gives the same bits in any
    # order of adding.
    x = (torch.randn(shape) * 2 + 0.5).mul(64).round().div(64).to(dtype)
    integers = torch.randint(0, 2**weight_bits, (out_features, in_features)).to(torch.uint8)
    tensors = dict.fromkeys(NAMES) | {
        "weight": pack(integers, weight_bits),
        "weight_scale": (torch.rand(out_features, groups) + 0.1).to(torch.bfloat16),
    }
    if not symmetric:
        zero_point = torch.randint(0, 2**weight_bits, (out_features, groups))
        tensors["weight_zero_point"] = zero_point.to(torch.uint8)
    if bias:
        tensors["bias"] = torch.randn(out_features).to(dtype)
    if granularity in STATIC:
        positions = shape[-2] if len(shape) > 1 else 1
        length = in_features if granularity == "channel" else positions
        tensors["input_scale"] = (torch.rand(length) + 0.5) * 4 / top
        low, high = top // 4, top - top // 4 + 1
        tensors["input_zero_point"] = torch.randint(low, high, (length,), dtype=torch.int32)
    if granularity == "none" and scaled_input:
        tensors["input_scale"] = torch.rand(in_features) + 0.5
    return Case(x, integers, tensors, scheme)


def make_site(granularity, out_features, *bits, **options):
    """Arguments of `ops.linear.linears`: modules with so many outputs that read the same input."""
    cases = [make_case(granularity, *bits, out_features=n, **options) for n in (*out_features, 1)]
    grid = {name: cases[-1].tensors[name] for name in ("input_scale", "input_zero_point")}
    x, _, *numbers = cases[-1].call
    return x, [case.tensors | grid for case in cases[:-1]], *numbers


def one_by_one(x, weights, *numbers, reference=False):
    """What `linear` gives for the modules of a site."""
    return [linear(x, tensors, *numbers, reference=reference) for tensors in weights]


def flat(x, weights, in_features, scheme):
    """Arguments of the operator `linears`."""
    numbers = numbers_of(in_features, scheme)
    calls = [(*(tensors[name] for name in NAMES), *numbers) for tensors in weights]
    return x, *lists(*calls)


def agree(y, expected):
    """As close as one rounding to the output's dtype and float32 sums allow."""
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    if y.numel():
        error, largest = (y.float() - expected.float()).abs().max(), expected.float().abs().max()
        assert error <= TIGHT[y.dtype] * largest


def cpu_kernel(in_features=128, weight_bits=4, activation_bits=4, group_size=64):
    """The name of what computes on this CPU."""
    scheme = QuantScheme(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        group_size=group_size,
        granularity="none" if activation_bits == 16 else "channel",
    )
    return kernel_name(torch.device("cpu"), in_features, scheme)


def with_threads(compute, counts=(1, 2, 3)):
    """What `compute` returns with so many threads each."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(compute())
    finally:
        torch.set_num_threads(before)
    return found


def run_python(code, *words, **environment):
    """What a process of its own prints; it finds the tests' modules."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests / "ops"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
