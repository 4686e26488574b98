"""Whole models for `qvlm bench`: the contenders, how each is built, and the table."""

import argparse
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, StaticCache

from qvlm_hf.bench.machine import (
    Limits,
    available_bytes,
    device_name,
    has_bfloat16_units,
    measure_limits,
)
from qvlm_hf.bench.random_models import picture_tokens, random_model, random_prompt
from qvlm_hf.bench.whole_models import Contender, fits_together, measure_models
from qvlm_hf.calibration.samples import longest_sample
from qvlm_hf.cli.bench_tables import model_table
from qvlm_hf.cli.loading import load_model, read_config, silence
from qvlm_hf.cli.shapes import plan, read_shape
from qvlm_hf.errors import first_line
from qvlm_hf.format.scheme import parse_scheme
from qvlm_hf.hf.runtime.compiling import ROUND_AS_EAGER
from qvlm_hf.hub.saved import SavedModel, empty_model
from qvlm_hf.nn.footprint import footprint
from qvlm_hf.nn.replace import dequantize_modules

__all__ = ["Peer", "bench_models"]

_QUESTION = 32  # tokens of a short question
_VERSIONS = ("qvlm_hf", "torch", "transformers", "bitsandbytes", "torchao", "gptqmodel", "triton")


@dataclass(frozen=True)
class _Quantized:
    name: str
    build: Callable[[], Any]
    activation_bits: int
    bytes: int


@dataclass(frozen=True)
class Peer:
    """Another package's way to quantize (tests/bench/peers.py)."""

    name: str  # of the row
    package: str  # to import
    quantize: Callable[[Any], None]  # changes a model in place
    compute: str  # type of its products
    share: float  # bytes of its weights over those of bfloat16, roughly

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        return None if find_spec(self.package) else "not installed"


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model in full precision and quantized, saved or of a named shape."""

    title: str
    config: Any
    full_precision: Callable[[torch.dtype], Any]
    bfloat16_bytes: int
    image_tokens: int | None
    positions: int | None
    quantized: Sequence[_Quantized]


def bench_models(options: argparse.Namespace, peers: Sequence[Peer] = ()) -> dict[str, Any]:
    """Measures, prints and returns the result as JSON has it.

    Raises:
        ValueError: a value makes no sense, there is no such device, or the baseline failed.
    """
    images = options.images
    least = min(options.new_tokens, options.rounds, 1 + min(options.batch))
    if least < 2 or (images is not None and images < 0):
        raise ValueError(
            "--new-tokens and --rounds must be at least 2, --batch at least 1, --images at least 0."
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here: take --device cpu.")
    silence()
    device = torch.device(options.device)
    subject = _shape(options, device) if options.directory is None else _saved(options, device)
    image_tokens = subject.image_tokens
    if images and image_tokens is None:
        raise ValueError(
            f"--images {images}: {subject.config.model_type!r} takes pictures in another form than "
            f"this command makes: take --images 0."
        )
    images = int(image_tokens is not None) if images is None else images
    prompt_tokens = options.prompt_tokens
    if prompt_tokens is None:
        prompt_tokens = images * (image_tokens or 0) + _QUESTION
    if subject.positions is not None and prompt_tokens + options.new_tokens > subject.positions:
        raise ValueError(
            f"--prompt-tokens {prompt_tokens} and --new-tokens {options.new_tokens} are more than "
            f"the model's {subject.positions} positions: take fewer."
        )
    settings = {
        "model": subject.title,
        "batch": options.batch,
        "prompt_tokens": prompt_tokens,
        "images": images,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "compile": options.compile,
    }
    prompt = partial(
        random_prompt,
        subject.config,
        prompt_tokens=prompt_tokens,
        image_tokens=image_tokens or 0,
        images=images,
        device=device,
    )
    prompt(1, dtype=torch.bfloat16)  # a wrong length should not wait for the models
    contenders = list(_contenders(subject, prompt, device, static=options.compile, peers=peers))
    together = fits_together(contenders, available_bytes(device))
    print(
        f"{subject.title}; prompt tokens: {prompt_tokens}, pictures: {images}, "
        f"new tokens: {options.new_tokens}"
    )
    turns = len(options.batch) * (options.rounds + 1 + options.compile)
    total = turns * sum(one.missing is None for one in contenders)
    with tqdm(total=total, disable=None, leave=False) as bar:
        rows, limits = measure_models(
            contenders,
            options.batch,
            partial(measure_limits, device),
            device,
            new_tokens=options.new_tokens,
            rounds=options.rounds,
            compiled=options.compile,
            together=together,
            advance=bar.update,
        )
    order = "every way in turns" if together else "one way after the other: memory holds one"
    compiled = ", torch.compile and a static cache" if options.compile else ""
    print(f"median of {options.rounds} rounds, {order}{compiled}")
    for line in model_table(rows):
        print(line)
    print(_machine(device, limits))
    return {
        "device": device_name(device),
        "device_type": device.type,
        "bfloat16_units": has_bfloat16_units(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": _versions(),
        "settings": settings,
        "limits": asdict(limits),
        "together": together,
        "rows": [asdict(row) for row in rows],
    }


def _shape(options: argparse.Namespace, device: torch.device) -> _Subject:
    """A shape with random weights."""
    name, config, head = options.shape, read_shape(options.shape), options.lm_head_bits
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"--shape {name}: is quantized already: give it as DIR.")
    model = empty_model(config)
    quantized, full = [], 0
    for scheme in options.scheme or ["W4A8"]:
        modules = plan(model, scheme, lm_head_bits=head).report.modules
        sizes = footprint(model, modules).total
        full = sizes.full_precision_bytes
        title = f"qvlm_hf {scheme.upper()}{f', head W{head}' if head else ''}"
        build = partial(random_model, config, dtype=torch.bfloat16, device=device, modules=modules)
        bits = parse_scheme(scheme)[1]
        quantized.append(_Quantized(title, build, bits, sizes.quantized_bytes))
    return _Subject(
        title=f"{name}, random weights",
        config=config,
        full_precision=lambda dtype: random_model(config, dtype=dtype, device=device),
        bfloat16_bytes=full,
        image_tokens=picture_tokens(model),
        positions=longest_sample(model),
        quantized=quantized,
    )


def _saved(options: argparse.Namespace, device: torch.device) -> _Subject:
    """A saved model beside its full-precision one."""
    directory, base = options.directory, options.against
    saved = SavedModel(directory)
    scheme, sizes = saved.quantization["scheme"], saved.sizes(torch.bfloat16)
    if base is not None:
        _check_baseline(base)

    def full_precision(dtype: torch.dtype) -> Any:
        model = load_model(base or directory, dtype=dtype)
        dequantize_modules(model, dtype)
        return model.to(device)

    def build() -> Any:
        return load_model(directory, dtype=torch.bfloat16).to(device)

    name, bits = f"qvlm_hf {scheme}", parse_scheme(scheme)[1]
    against = "its own weights, dequantized" if base is None else Path(base).name
    return _Subject(
        title=f"{Path(directory).resolve().name} against {against}",
        config=saved.config,
        full_precision=full_precision,
        bfloat16_bytes=sizes.total.full_precision_bytes,
        image_tokens=picture_tokens(saved.model),
        positions=longest_sample(saved.model),
        quantized=[_Quantized(name, build, bits, sizes.total.quantized_bytes)],
    )


def _check_baseline(base: str) -> None:
    """Looks for the full-precision model before anything is measured.

    Raises:
        ValueError: it is neither here nor on the Hub, or is quantized.
        ConnectionError: it is not here, and the Hub cannot be asked.
    """
    try:
        config = read_config(base)
    except ConnectionError:
        raise
    except OSError as error:
        raise ValueError(
            f"--against {base}: is no model's directory and no Hub id that can be read "
            f"({first_line(error).rstrip('.')}): check the name."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"--against {base}: is quantized itself: give the full-precision model.")


def _contenders(
    subject: _Subject,
    prompt: Callable[..., Mapping[str, Tensor]],
    device: torch.device,
    *,
    static: bool,
    peers: Sequence[Peer],
) -> Iterator[Contender]:
    """The baseline first."""
    size, bfloat16 = subject.bfloat16_bytes, torch.bfloat16

    def contender(
        name: str,
        build: Callable[[], Any],
        compute: str,
        dtype: torch.dtype = bfloat16,
        **more: Any,
    ) -> Contender:
        inputs, caches = partial(prompt, dtype=dtype), _caches(subject.config, static=static)
        return Contender(
            name=name, build=build, inputs=inputs, new_cache=caches, compute=compute, **more
        )

    full = subject.full_precision
    yield contender("bfloat16", partial(full, bfloat16), "bfloat16", size=size)
    if not has_bfloat16_units(device):
        build = partial(full, torch.float32)
        yield contender("float32", build, "float32", torch.float32, size=2 * size)
    floating = "bfloat16" if device.type == "cuda" else "float32"  # of products with float inputs
    for one in subject.quantized:
        compute = "int8" if one.activation_bits <= 8 else floating
        yield contender(
            one.name, one.build, compute, size=one.bytes, compile_options=ROUND_AS_EAGER
        )

    def quantized_by(quantize: Callable[[Any], None]) -> Any:
        model = full(bfloat16)
        quantize(model)
        return model

    for peer in peers:
        yield contender(
            peer.name,
            partial(quantized_by, peer.quantize),
            peer.compute,
            size=int(size * peer.share),
            building=size,
            missing=peer.missing,
        )


def _caches(config: Any, *, static: bool) -> Callable[[int, int], Any]:
    """Batch size, length -> an empty cache.

    A static one is used again: compiled code is tied to its memory.
    """
    if not static:
        return lambda _batch, _length: DynamicCache(config=config.get_text_config(decoder=True))
    latest: dict[tuple[int, int], Any] = {}

    def new_cache(batch: int, length: int) -> Any:
        if (batch, length) in latest:
            latest[batch, length].reset()
        else:
            latest.clear()
            latest[batch, length] = StaticCache(config=config, max_cache_len=length)
        return latest[batch, length]

    return new_cache


def _machine(device: torch.device, limits: Limits) -> str:
    speeds = ", ".join(f"{name} {rate / 1e12:.3g} T/s" for name, rate in limits.operations.items())
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    units = "" if has_bfloat16_units(device) else ", no bfloat16 unit"
    verb = "copies" if device.type == "cuda" else "reads"
    bandwidth = f"{limits.bandwidth / 1e9:.1f} GB/s"
    return f"{device_name(device)}{threads}{units}: {verb} {bandwidth}, multiplies {speeds}"


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
