"""Whole models, many ways: first token, further tokens, memory, and what limits each phase.

Takes ready modules and inputs: it knows of Transformers only how a model is called
(`generation.py`). All ways are in memory together and take turns; where they do not fit, they run
one after the other, and the result says so.

    compute   2 x inputs x outputs of every linear module of the decoder, per token, against PyTorch's matrix product in the same type
    memory    bytes of the decoder's weights and of the key-value cache, per call, against reading memory
    regime    the limit of which a phase reaches more, if that is at least half of it; else "overhead": launches, Python, attention

Left out: the products of attention itself, a few percent of a prompt of 600 tokens.
"""

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.bench.generation import Pass, generate
from qvlm_hf.bench.machine import Clock, Limits
from qvlm_hf.bench.memory import decoder_bytes, peak_bytes, stored_bytes
from qvlm_hf.bench.rounds import Figure, figure, one_line, take_turns
from qvlm_hf.nn.replace import quantized_modules

__all__ = ["ModelRow", "Phase", "Way", "fits_together", "measure_models", "phase"]

_HALF = 0.5  # of a limit, from which on it is the limit
_RESERVE = 1.1  # times the stored bytes: activations and caches
_COMPILED_WARM_UPS = 2  # importing one package can void the code that was compiled for another way
_COMPILED = (
    256  # variants that torch.compile may keep of one function: ways share the code of their models
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run the model.

    Attributes:
        name: of the row.
        build: makes the model on its device, in eval mode.
        inputs: batch size -> what the model is called with.
        new_cache: batch size, length -> an empty key-value cache.
        compute: the type that its matrix products could run in, a key of `Limits.operations`.
        compile_options: of inductor, where it is compiled, besides those of the device.
        size: bytes of the weights, estimated.
        building: bytes that `build` needs besides, for a while.
        missing: why it cannot run here, or None.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[int], Mapping[str, Tensor]]
    new_cache: Callable[[int, int], Any]
    compute: str = "bfloat16"
    compile_options: Mapping[str, bool] = field(default_factory=dict)
    size: int = 0
    building: int = 0
    missing: str | None = None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of one way.

    Attributes:
        time: per phase; decode: per token.
        regime: "memory", "compute" or "overhead".
        of_limit: the share that it reaches of that limit; for "overhead" of the nearer one.
    """

    time: Figure
    regime: str
    of_limit: float


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One way at one batch size; with an `error` nothing else is known.

    Attributes:
        way: its name.
        batch: prompts at once.
        error: why there are no figures.
        first_token: vision encoder and prefill.
        prefill: the decoder over the prompt.
        decode: one further token.
        tokens_per_second: of all prompts, while decoding.
        weight_bytes: stored.
        peak_bytes: the weights and the most that the first pass takes besides (compiling included);
            None where that cannot be measured.
        kernel: what computes most of the quantized modules, None where there are none.
    """

    way: str
    batch: int
    error: str | None = None
    first_token: Figure | None = None
    prefill: Phase | None = None
    decode: Phase | None = None
    tokens_per_second: float | None = None
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    kernel: str | None = None


@dataclass
class _Built:
    """A way whose model is there."""

    way: Way
    model: Any
    step: Callable[..., Any]


@dataclass
class _Measured:
    passes: list[Pass] | str
    peak: int | None = None
    weights: int = 0
    read: int = 0
    kernel: str | None = None


def measure_models(
    ways: Sequence[Way],
    batches: Sequence[int],
    limits: Callable[[], Limits],
    device: torch.device,
    *,
    new_tokens: int = 32,
    rounds: int = 5,
    compiled: bool = False,
    together: bool = True,
    clock: Clock | None = None,
    advance: Callable[[], object] = lambda: None,
) -> tuple[list[ModelRow], Limits]:
    """Measures every way at every batch size.

    Args:
        ways: the first is the baseline.
        batches: batch sizes.
        limits: measures those of the device; called before and after everything else, and the
            higher ones count.
        device: where the models are.
        new_tokens: generated per prompt, at least 2.
        rounds: turns that count, at least 2.
        compiled: decode with torch.compile, on CUDA with CUDA graphs; the caches must be static.
        together: all ways in memory, in turns; else one after the other.
        clock: default: the device's own.
        advance: called after every pass.

    Returns:
        Rows by batch size, in the order of `ways`; and the limits.

    Raises:
        ValueError: the baseline failed.
    """
    clock, operations = clock or Clock(device), 0
    measured: dict[tuple[str, int], _Measured] = {}
    before = limits()
    with _many_variants() if compiled else nullcontext():
        for group in [list(ways)] if together else [[way] for way in ways]:
            built = {way.name: _build(way, compiled) for way in group}
            baseline = built.get(ways[0].name)
            if isinstance(baseline, _Built):
                operations = _operations(baseline.model)
            for batch in batches:
                if compiled:
                    torch._dynamo.reset()
                found = _turns(
                    built,
                    batch,
                    new_tokens,
                    rounds,
                    _COMPILED_WARM_UPS if compiled else 1,
                    device,
                    clock,
                    advance,
                )
                measured |= {(name, batch): result for name, result in found.items()}
            built.clear()
            baseline = None
            _release(device)
    highest = before.highest(limits())
    return [
        _row(way, batch, ways[0], measured, highest, operations)
        for batch in batches
        for way in ways
    ], highest


def fits_together(ways: Sequence[Way], available: int | None) -> bool:
    """Whether all ways fit into memory at once, with room to build each beside the others."""
    here = [way for way in ways if way.missing is None]
    return (
        available is None
        or sum(way.size for way in here) * _RESERVE + max((way.building for way in here), default=0)
        < available
    )


def phase(time: Figure, moved: float, computed: float, limits: Limits, compute: str) -> Phase:
    """Says what limits a phase.

    Args:
        time: of the phase.
        moved: bytes that must be read.
        computed: multiplications and additions.
        limits: of the device.
        compute: the type of the products, a key of `limits.operations`.
    """
    memory = moved / time.seconds / limits.bandwidth
    peak = limits.operations.get(compute)
    products = computed / time.seconds / peak if peak else 0.0
    share = max(memory, products)
    nearer = "memory" if memory >= products else "compute"
    return Phase(time=time, regime=nearer if share >= _HALF else "overhead", of_limit=share)


def _build(way: Way, compiled: bool) -> _Built | str:
    if way.missing is not None:
        return way.missing
    try:
        model = way.build()
        step = _compiled_step(model, way.compile_options) if compiled else model
        return _Built(way, model, step)
    except Exception as error:  # another package's model: whatever it raises is its row
        return one_line(error)


def _compiled_step(model: Any, options: Mapping[str, bool]) -> Callable[..., Any]:
    on_cuda = next(model.parameters()).device.type == "cuda"
    # torch.compile takes a mode or options: the mode's own are among them
    mode = torch._inductor.list_mode_options()["reduce-overhead" if on_cuda else "default"]
    forward = torch.compile(model.forward, options={**mode, **options})
    if not on_cuda:
        return forward

    def step(**inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return forward(**inputs)

    return step


def _many_variants() -> AbstractContextManager[None]:
    return torch._dynamo.config.patch(
        recompile_limit=_COMPILED, accumulated_recompile_limit=_COMPILED
    )


def _turns(
    built: Mapping[str, _Built | str],
    batch: int,
    new_tokens: int,
    rounds: int,
    warm_ups: int,
    device: torch.device,
    clock: Clock,
    advance: Callable[[], object],
) -> dict[str, _Measured]:
    ready = {name: entry for name, entry in built.items() if isinstance(entry, _Built)}
    peaks: dict[str, int | None] = {}

    def run(name: str, _: int) -> Pass:
        entry, passes = ready[name], []
        inputs = entry.way.inputs(batch)
        cache = entry.way.new_cache(batch, inputs["input_ids"].shape[1] + new_tokens)

        def once() -> None:
            passes.append(generate(entry.model, inputs, new_tokens, cache, clock, entry.step))

        if name in peaks:
            once()
        else:  # the first pass also makes what a way keeps, such as weights in another order
            peaks[name] = peak_bytes(once, device)
        advance()
        return passes[0]

    passes = take_turns(ready, rounds, run, warm_ups=warm_ups)
    found = {name: _Measured(entry) for name, entry in built.items() if isinstance(entry, str)}
    for name, result in passes.items():
        entry, peak = ready[name], peaks.get(name)
        # counted after the passes: some packages quantize or reorder at the first call
        weights, read = stored_bytes(entry.model), decoder_bytes(entry.model)
        found[name] = _Measured(
            result, None if peak is None else weights + peak, weights, read, _kernel(entry.model)
        )
    return found


def _row(
    way: Way,
    batch: int,
    base: Way,
    measured: Mapping[tuple[str, int], _Measured],
    limits: Limits,
    operations: int,
) -> ModelRow:
    own, baseline = measured[way.name, batch], measured[base.name, batch]
    if isinstance(baseline.passes, str):
        raise ValueError(
            f"the baseline {base.name} failed, so there is nothing to compare with: "
            f"{baseline.passes}"
        )
    if isinstance(own.passes, str):
        return ModelRow(way=way.name, batch=batch, error=own.passes)

    def timed(part: str) -> Figure:
        return figure(
            [getattr(p, part) for p in own.passes], [getattr(p, part) for p in baseline.passes]
        )

    decode, cached = timed("decode"), median(p.cache_bytes for p in own.passes)
    prompt = batch * way.inputs(batch)["input_ids"].shape[1]
    return ModelRow(
        way=way.name, batch=batch, first_token=timed("first_token"),
        prefill=phase(timed("prefill"), own.read, operations * prompt, limits, way.compute),
        decode=phase(decode, own.read + cached, operations * batch, limits, way.compute),
        tokens_per_second=batch / decode.seconds, weight_bytes=own.weights, peak_bytes=own.peak, kernel=own.kernel,
    )  # fmt: skip


def _operations(model: Any) -> int:
    """Multiplications and additions of the decoder's linear modules for one token; the head, which sees one of many, is not counted."""
    return sum(
        2 * module.in_features * module.out_features
        for module in model.get_decoder().modules()
        if isinstance(module, nn.Linear)
    )


def _kernel(model: nn.Module) -> str | None:
    counts = Counter(module.kernel for _, module in quantized_modules(model))
    return counts.most_common(1)[0][0] if counts else None


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
