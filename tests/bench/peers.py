"""`qvlm bench` with other packages in turn, where installed: bitsandbytes, torchao, gptqmodel.

    python tests/bench/peers.py --shape demo-1b --scheme W4A8 --new-tokens 16 --rounds 3

Each quantizes a float model as it would inside Transformers: every nn.Linear but the output head;
gptqmodel those of the decoder. Left out: gptqmodel's calibration, which changes values and no time;
and its QQQ (W4A8), which unpacks all weights at every call on a CPU without AVX512-BF16.
"""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.cli import bench
from qvlm_hf.cli.bench_models import Peer
from qvlm_hf.nn.replace import replace_modules

__all__ = ["PEERS"]

_GROUP = 128


def _bitsandbytes_8bit(model: Any) -> None:
    _silence()
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    def quantized(linear: nn.Linear) -> nn.Module:
        module = Linear8bitLt(
            linear.in_features,
            linear.out_features,
            has_fp16_weights=False,
            threshold=6.0,
            device="meta",
        )
        # from the CPU: bitsandbytes quantizes 8-bit weights only on their way to another place
        weight = linear.weight.data.cpu()
        module.weight = Int8Params(weight, has_fp16_weights=False, requires_grad=False)
        module.bias = linear.bias
        return module

    _replace(model, quantized)


def _bitsandbytes_4bit(model: Any) -> None:
    _silence()
    from bitsandbytes.nn import Linear4bit, Params4bit

    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}

    def quantized(linear: nn.Linear) -> nn.Module:
        sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
        module = Linear4bit(*sizes, compute_dtype=dtype, device="meta", **options)
        weight = linear.weight.data
        module.weight = Params4bit(weight, requires_grad=False, module=module, **options)
        module.bias = linear.bias
        return module

    _replace(model, quantized)


def _torchao_int4(model: Any) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    if model.device.type == "cpu":
        # torchao moved the layout that its CPU kernel reads
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config: Any = PrototypeInt4WeightOnlyConfig(group_size=_GROUP, set_inductor_config=False)
    else:
        config = Int4WeightOnlyConfig(
            group_size=_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    quantize_(model, config, filter_fn=_chosen(model))
    if all(type(module.weight.data) is Tensor for _, module in _linears(model)):
        raise ValueError(
            f"torchao quantizes nothing here: no module has a multiple of {_GROUP} inputs."
        )


def _torchao_int8(model: Any) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(model, config, filter_fn=_chosen(model))


def _gptqmodel_int4(model: Any) -> None:
    chosen = {"bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True}
    loading = {"format": "gptq", "quant_method": "gptq", "pack": False, "backend": "auto"}
    with redirect_stdout(StringIO()):  # a banner, and a line for every kernel considered
        from gptqmodel.utils.importer import hf_select_quant_linear_v2

        # as Transformers' loader of GPTQ checkpoints asks
        kernel = hf_select_quant_linear_v2(
            **chosen, **loading, dtype=model.dtype, device_map={"": str(model.device)}
        )

        def quantized(linear: nn.Linear) -> nn.Module:
            sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
            module = kernel(**chosen, **sizes, bias=linear.bias is not None, pack_dtype=torch.int32)
            for name, tensor in _gptq_tensors(linear, v2=kernel.REQUIRES_FORMAT_V2).items():
                getattr(module, name).copy_(tensor)
            module.to(linear.weight.device).post_init()
            return module

        _replace(model, quantized, decoder_only=True)


def _gptq_tensors(linear: nn.Linear, *, v2: bool) -> dict[str, Tensor]:
    """A symmetric 4-bit module in a GPTQ checkpoint, eight codes to a word.

    Version 1 stores zero points minus one.
    """
    groups = linear.weight.data.float().unflatten(-1, (-1, _GROUP))
    scale = groups.abs().amax(-1) / 7
    codes = ((groups / scale.unsqueeze(-1)).round() + 8).flatten(1).to(torch.int64)  # [out, in]
    shifts = torch.arange(0, 32, 4, device=codes.device)
    words = (codes.T.unflatten(0, (-1, 8)) << shifts[:, None]).sum(1).to(torch.int32)
    zeros = (scale.shape[1], linear.out_features // 8)
    zero = torch.full(zeros, -0x77777778 if v2 else 0x77777777, dtype=torch.int32)
    tensors = {"qweight": words, "qzeros": zero, "scales": scale.T}
    return tensors if linear.bias is None else tensors | {"bias": linear.bias.data}


PEERS = (
    Peer("bitsandbytes 8-bit", "bitsandbytes", _bitsandbytes_8bit, "int8", 0.5),
    Peer("bitsandbytes 4-bit (nf4)", "bitsandbytes", _bitsandbytes_4bit, "bfloat16", 0.28),
    Peer("torchao int4 weight-only", "torchao", _torchao_int4, "bfloat16", 0.28),
    Peer("torchao int8 dynamic", "torchao", _torchao_int8, "int8", 0.5),
    # last: importing it patches Transformers, Triton and the environment
    Peer("gptqmodel int4 weight-only", "gptqmodel", _gptqmodel_int4, "bfloat16", 0.45),
)


def _silence() -> None:
    """Stops bitsandbytes' line at every call of every module, which would be timed too."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            yield name, module


def _chosen(model: Any) -> Callable[[nn.Module, str], bool]:
    names = {name for name, _ in _linears(model)}
    return lambda _, name: name in names


def _replace(
    model: Any, quantized: Callable[[nn.Linear], nn.Module], *, decoder_only: bool = False
) -> None:
    """One module at a time, so that no second model is in memory."""
    root = model.get_decoder() if decoder_only else model
    among = set(root.modules())
    for name, linear in _linears(model):
        if linear in among:
            # bitsandbytes quantizes when the weight is moved
            replace_modules(model, {name: quantized(linear).to(linear.weight.device).eval()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    bench.add_arguments(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    bench.run(chosen, PEERS)
