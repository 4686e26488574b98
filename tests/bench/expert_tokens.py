"""How many tokens an expert must have seen before ranges and rounding of its own pay.

A mixture of experts of random weights gets structured inputs: topics, channels that hang together,
some of them far larger. One expert is quantized from the first n tokens that it gets, and judged on
1000 others. Printed is the error of its output, in squares, over that of an expert without tokens:
ranges of all experts together, weights rounded to nearest. Either has the best of three margins.

    PYTHONPATH=tests python tests/bench/expert_tokens.py --json FILE
"""

import argparse
import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from tiny_families import OWN_DECODERS, TOWERS, tiny_family
from torch import Tensor, nn

from qvlm_hf.calibration.search.gptq import gptq_round
from qvlm_hf.calibration.search.observers import TailObserver, candidate_qparams
from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.format.grids import QParams, dynamic_token_qparams, quantize_weight, shift_quantize
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.hf.runtime.experts import register_experts
from qvlm_hf.models.experts import find_experts, split_experts

FAMILIES = ("qwen3_vl_moe", "llama4")
SCHEMES = {"W4A4": (4, "channel"), "W4A8": (8, "dynamic_token")}
WIDTHS = (128, 512)
EXPERTS = 8
SEEN = (4, 8, 16, 32, 64, 128, 256, 512)
HELD_OUT = 1000
TOKENS = 16000
MARGINS = (1.0, 1.1, 1.25)


def structured(width: int, generator: torch.Generator) -> Tensor:
    """[TOKENS, width], each row of norm sqrt(width): topics, and a spectrum of 1 / k around them."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    topics = draw(24, width)[torch.randint(24, (TOKENS,), generator=generator)]
    spectrum = torch.arange(1, width + 1).rsqrt()[:, None]
    x = 0.5 * topics + draw(TOKENS, width) @ (torch.linalg.qr(draw(width, width))[0] * spectrum) * (
        width**0.5 / 3
    )
    scales = (0.5 * draw(width)).exp()
    scales[torch.randperm(width, generator=generator)[: width // 64]] *= 10
    x = x * scales + 0.3 * scales * draw(width)
    return x * x.square().mean(-1, keepdim=True).rsqrt()


def expert_inputs(family: str, width: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of both projections of an expert: weight, its inputs, and some inputs of all experts."""
    sizes = ("hidden_size", "intermediate_size", "moe_intermediate_size")
    text = OWN_DECODERS[family] | dict.fromkeys(sizes, width)
    text |= dict.fromkeys(("num_experts", "num_local_experts"), EXPERTS)
    vision = TOWERS[family] | {"out_hidden_size": width}
    model = tiny_family(family, family, family, seed, text_config=text, vision_config=vision)
    register_experts(model)
    split_experts(model)
    name, experts = next(iter(find_experts(model).items()))
    mixture, generator = model.get_submodule(name.rpartition(".")[0]), torch.Generator()
    generator.manual_seed(seed)
    for parameter in mixture.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values * parameter.shape[-1] ** -0.5
    seen: dict[nn.Module, Tensor] = {}
    projections = [list(experts.gate_up_proj), list(experts.down_proj)]
    for linear in (linear for linears in projections for linear in linears):
        linear.register_forward_pre_hook(lambda linear, args: seen.update({linear: args[0]}))
    with torch.no_grad():
        mixture(structured(width, generator)[None])
    enough = [len(seen.get(one, ())) >= SEEN[-1] + HELD_OUT for one in projections[0]]
    chosen = enough.index(True)
    return [
        (
            linears[chosen].weight.detach(),
            seen[linears[chosen]],
            torch.cat([seen[one][: SEEN[-1]] for one in linears if one in seen]),
        )
        for linears in projections
    ]


def error(
    weight: Tensor, ranges: Tensor, rounded_on: Tensor | None, fresh: Tensor, scheme: QuantScheme
) -> float:
    """Share of the output's squares that is lost; the best of the margins on a static range."""
    if scheme.granularity != "channel":
        return _error(weight, None, rounded_on, fresh, scheme)
    tails = TailObserver(count=len(ranges), percentile=1.0)
    tails.update(ranges.T)
    grids = [
        candidate_qparams(
            RangeCandidate(granularity="channel", margin=margin),
            {"channel": tails},
            scheme.activation_bits,
        )
        for margin in MARGINS
    ]
    return min(_error(weight, grid, rounded_on, fresh, scheme) for grid in grids)


def _error(
    weight: Tensor,
    static: QParams | None,
    rounded_on: Tensor | None,
    fresh: Tensor,
    scheme: QuantScheme,
) -> float:
    def inputs(x: Tensor) -> tuple[Tensor, Any]:
        grid = static or dynamic_token_qparams(x, scheme.activation_bits)
        return shift_quantize(x, grid), 1.0 if static else grid.scale

    folded = weight * static.scale if static else weight
    quantized = quantize_weight(folded, scheme, None)
    if rounded_on is not None:
        a, scale = inputs(rounded_on)
        hessian = (a * scale).T @ (a * scale)
        quantized = gptq_round(folded, hessian, quantized, scheme.weight_bits)
    expected, (a, scale) = fresh @ weight.T, inputs(fresh)
    lost = a @ quantized.dequantize().T * scale - expected
    return float(lost.square().sum() / expected.square().sum())


def compare(family: str, width: int, scheme: QuantScheme, seeds: int) -> dict[int, float]:
    """Tokens seen -> the ratio of errors, over seeds and both projections."""
    ratios: dict[int, list[float]] = {count: [] for count in SEEN}
    for seed in range(seeds):
        for weight, own, everything in expert_inputs(family, width, seed):
            fresh = own[SEEN[-1] :][:HELD_OUT]
            without = error(weight, everything, None, fresh, scheme)
            for count in SEEN:
                some = own[:count]
                ratios[count].append(error(weight, some, some, fresh, scheme) / without)
    return {count: round(geometric_mean(found), 2) for count, found in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for family in FAMILIES:
        for width in WIDTHS:
            for name, (bits, granularity) in SCHEMES.items():
                scheme = QuantScheme(weight_bits=4, activation_bits=bits, granularity=granularity)
                row = f"{family}, {width} channels, {name}"
                found[row] = compare(family, width, scheme, options.seeds)
                print(row, found[row], flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
