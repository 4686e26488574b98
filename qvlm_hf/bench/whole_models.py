"""Whole models beside each other: first token, further tokens, memory, and the limit of each phase.

Takes ready models and inputs; all contenders are in memory together and take turns. Where they do
not fit, they run one after the other, and the result says so.

    compute     2 x inputs x outputs of every linear module of the decoder, per token,
                against PyTorch's matrix product in the same type
    memory      bytes of the decoder's weights and of the key-value cache, per call,
                against reading memory
    overhead    the phase reaches half of neither: launches, Python, attention

Left out: the products of attention itself, a few percent of a prompt of 600 tokens.
"""

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.bench.generation import Pass, generate
from qvlm_hf.bench.machine import Clock, Limits
from qvlm_hf.bench.memory import decoder_bytes, peak_bytes, stored_bytes
from qvlm_hf.bench.turns import Timing, summarize, take_turns
from qvlm_hf.errors import one_line
from qvlm_hf.nn.replace import quantized_modules

__all__ = ["Contender", "ModelRow", "Phase", "fits_together", "measure_models", "phase"]

_HALF = 0.5  # of a limit, from which on it is the limit
_RESERVE = 1.1  # times the stored bytes: activations and caches
_COMPILED_WARM_UPS = 2  # importing one package can void the code that was compiled before
_VARIANTS = 256  # that torch.compile may keep of one function: contenders share their models' code


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to run the model."""

    name: str
    build: Callable[[], Any]  # the model on its device, in eval mode
    inputs: Callable[[int], Mapping[str, Tensor]]  # batch size -> arguments of the model
    new_cache: Callable[[int, int], Any]  # batch size, length -> an empty key-value cache
    compute: str = "bfloat16"  # type that its products could run in, of `Limits.operations`
    compile_options: Mapping[str, bool] = field(default_factory=dict)  # of inductor
    size: int = 0  # bytes of the weights, estimated
    building: int = 0  # bytes that `build` needs besides, for a while
    missing: str | None = None  # why it cannot run here


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of one contender."""

    time: Timing  # decode: of a token
    regime: str  # "memory", "compute" or "overhead"
    of_limit: float  # share of that limit that it reaches; for "overhead" of the nearer one


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One contender at one batch size; with an `error` nothing else is known."""

    way: str  # name of the contender
    batch: int  # prompts at once
    error: str | None = None
    first_token: Timing | None = None  # vision encoder and prefill
    prefill: Phase | None = None
    decode: Phase | None = None
    tokens_per_second: float | None = None  # of all prompts, while decoding
    weight_bytes: int | None = None  # stored
    peak_bytes: int | None = None  # weights and the most that the first pass takes besides
    kernel: str | None = None  # of most quantized modules


def measure_models(
    contenders: Sequence[Contender],
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
    """Measures every contender at every batch size.

    Args:
        contenders: the first is the baseline.
        batches: batch sizes.
        limits: measures those of the device, before and after all else; the higher ones count.
        device: where the models are.
        new_tokens: generated per prompt, at least 2.
        rounds: turns that count, at least 2.
        compiled: decode with torch.compile, on CUDA with CUDA graphs; the caches must be static.
        together: all contenders in memory, in turns; else one after the other.
        clock: default: the device's own.
        advance: called after every pass.

    Returns:
        Rows by batch size, in the order of `contenders`; and the limits.

    Raises:
        ValueError: the baseline failed.
    """
    stage = _Stage(device, clock or Clock(device), new_tokens, rounds, compiled, advance)
    measured: dict[tuple[str, int], _Measured | str] = {}
    before = limits()
    for group in [contenders] if together else [[one] for one in contenders]:
        measured |= stage.measure(group, batches)
        stage.clear()
    highest = before.highest(limits())
    rows = [
        _row(one, batch, contenders[0], measured, highest)
        for batch in batches
        for one in contenders
    ]
    return rows, highest


def fits_together(contenders: Sequence[Contender], available: float) -> bool:
    """Whether all fit into memory at once, with room to build each beside the others."""
    here = [one for one in contenders if one.missing is None]
    needed = sum(one.size for one in here) * _RESERVE + max((c.building for c in here), default=0)
    return needed < available


def phase(time: Timing, moved: float, computed: float, limits: Limits, compute: str) -> Phase:
    """The limit of a phase that reads `moved` bytes and computes operations in type `compute`."""
    memory = moved / time.seconds / limits.bandwidth
    peak = limits.operations.get(compute)
    products = computed / time.seconds / peak if peak else 0.0
    share = max(memory, products)
    nearer = "memory" if memory >= products else "compute"
    return Phase(time=time, regime=nearer if share >= _HALF else "overhead", of_limit=share)


@dataclass(frozen=True)
class _Ready:
    """A contender that is built."""

    contender: Contender
    model: Any
    step: Callable[..., Any]


@dataclass(frozen=True)
class _Measured:
    passes: list[Pass]
    peak: int | None  # of the first pass, beside the weights
    weights: int
    read: int  # bytes of weights that a step of the decoder reads
    operations: int  # multiplications and additions per token in the decoder's nn.Linear
    kernel: str | None


@dataclass(frozen=True)
class _Stage:
    """Where contenders are built and take their turns."""

    device: torch.device
    clock: Clock
    new_tokens: int
    rounds: int
    compiled: bool
    advance: Callable[[], object]

    def measure(
        self, group: Sequence[Contender], batches: Sequence[int]
    ) -> dict[tuple[str, int], _Measured | str]:
        """Builds a group; (name, batch size) -> figures or an error."""
        built = {one.name: self._build(one) for one in group}
        ready = {name: one for name, one in built.items() if isinstance(one, _Ready)}
        found: dict[tuple[str, int], _Measured | str] = {}
        for batch in batches:
            results = self._take_turns(ready, batch)
            for name, one in built.items():
                found[name, batch] = one if isinstance(one, str) else results[name]
        return found

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _build(self, contender: Contender) -> _Ready | str:
        if contender.missing is not None:
            return contender.missing
        try:
            model = contender.build()
            step = _compiled_step(model, contender.compile_options) if self.compiled else model
            return _Ready(contender, model, step)
        except Exception as error:  # another package's model: its error is its row
            return one_line(error)

    def _take_turns(self, ready: Mapping[str, _Ready], batch: int) -> dict[str, _Measured | str]:
        peaks: dict[str, int | None] = {}

        def run(name: str, _turn: int) -> Pass:
            one, passes = ready[name], []
            inputs = one.contender.inputs(batch)
            cache = one.contender.new_cache(batch, inputs["input_ids"].shape[1] + self.new_tokens)

            def answer() -> None:
                found = generate(one.model, inputs, self.new_tokens, cache, self.clock, one.step)
                passes.append(found)

            if name in peaks:
                answer()
            else:  # the first pass also makes what stays, such as weights in another order
                peaks[name] = peak_bytes(answer, self.device)
            self.advance()
            return passes[0]

        if not self.compiled:
            results = take_turns(ready, self.rounds, run)
        else:
            torch._dynamo.reset()
            with torch._dynamo.config.patch(
                recompile_limit=_VARIANTS, accumulated_recompile_limit=_VARIANTS
            ):
                results = take_turns(ready, self.rounds, run, warm_ups=_COMPILED_WARM_UPS)
        return {
            # weights are counted now: some packages quantize or reorder at the first call
            name: passes if isinstance(passes, str) else _figures(ready[name], passes, peaks[name])
            for name, passes in results.items()
        }


def _figures(one: _Ready, passes: list[Pass], peak: int | None) -> _Measured:
    kernels = Counter(module.kernel for _, module in quantized_modules(one.model))
    linears = (m for m in one.model.get_decoder().modules() if isinstance(m, nn.Linear))
    return _Measured(
        passes=passes,
        peak=peak,
        weights=stored_bytes(one.model),
        read=decoder_bytes(one.model),
        operations=sum(2 * linear.in_features * linear.out_features for linear in linears),
        kernel=kernels.most_common(1)[0][0] if kernels else None,
    )


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


def _row(
    contender: Contender,
    batch: int,
    baseline: Contender,
    measured: Mapping[tuple[str, int], _Measured | str],
    limits: Limits,
) -> ModelRow:
    own, base = measured[contender.name, batch], measured[baseline.name, batch]
    if isinstance(base, str):
        raise ValueError(
            f"the baseline {baseline.name} failed, so there is nothing to compare with: {base}"
        )
    if isinstance(own, str):
        return ModelRow(way=contender.name, batch=batch, error=own)

    def timing(part: str) -> Timing:
        return summarize(*([getattr(p, part) for p in one.passes] for one in (own, base)))

    def limited(part: str, cached: float, tokens: int) -> Phase:
        operations = base.operations * tokens
        return phase(timing(part), own.read + cached, operations, limits, contender.compute)

    decode = limited("decode", median(p.cache_bytes for p in own.passes), batch)
    return ModelRow(
        way=contender.name,
        batch=batch,
        first_token=timing("first_token"),
        prefill=limited("prefill", 0, contender.inputs(batch)["input_ids"].numel()),
        decode=decode,
        tokens_per_second=batch / decode.time.seconds,
        weight_bytes=own.weights,
        peak_bytes=None if own.peak is None else own.weights + own.peak,
        kernel=own.kernel,
    )
