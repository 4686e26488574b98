"""Random arguments of `qvlm_hf::linear`, besides its input."""

import torch

from qvlm_hf.core.packing import pack


def arguments(weight_bits, activation_bits, granularity, out_features, in_features, group_length, positions, symmetric, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_length)
    statics = {"channel": in_features, "token": positions}.get(granularity)
    integers = torch.randint(0, 2**weight_bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zero_point = torch.randint(0, 2**weight_bits, (out_features, groups), generator=generator, dtype=torch.uint8)
    return (
        pack(integers, weight_bits),
        ((torch.rand(out_features, groups, generator=generator) + 0.5) / 2 ** (weight_bits + activation_bits)).bfloat16(),
        None if symmetric else zero_point,
        None if statics is None else torch.rand(statics, generator=generator) * 8 / 2**activation_bits + 0.01,
        None if statics is None else torch.randint(0, 2**activation_bits, (statics,), generator=generator, dtype=torch.int32),
        torch.randn(out_features, generator=generator).to(dtype),
        in_features, weight_bits, 16 if granularity == "none" else activation_bits, group_length, granularity, 0,
    )  # fmt: skip
