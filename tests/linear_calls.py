"""Random arguments of `qvlm_hf::linear`, besides its input."""

import torch

from qvlm_hf.format.packing import pack

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
    (10, "other", "granularity='other' must be one of channel, token, dynamic_token, none."),
    (10, "none", "granularity='none' does not go with activation_bits=4"),
    *(
        (11, block, f"hadamard={block} must be None or a power of two from 2 to 4096.")
        for block in (-4, 1, 3)
    ),
)


def arguments(
    weight_bits,
    activation_bits,
    granularity,
    out_features,
    in_features,
    group_length,
    positions,
    symmetric,
    dtype,
    seed=0,
):
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
