"""What users would take instead, where it is installed: bitsandbytes, torchao and gptqmodel, applied to a float model module by module.

Each peer quantizes what it would quantize inside Transformers: every nn.Linear but the output head;
gptqmodel those of the decoder. Left
out: gptqmodel's calibration, which changes values and no time; and its QQQ (W4A8), which unpacks
all weights at every call on a CPU without AVX512-BF16.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.nn.replace import replace_modules

__all__ = ["PEERS", "Peer"]


_GROUP = 128


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another package's way.

    Attributes:
        name: of the row.
        package: to import.
        quantize: changes a model in place.
        compute: type of its products.
        share: bytes of its weights over those of bfloat16, roughly.
    """

    name: str
    package: str
    quantize: Callable[[Any], None]
    compute: str
    share: float

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        return None if find_spec(self.package) else "not installed"


def _bitsandbytes_8bit(model: Any) -> None:
    _silence()
    import bitsandbytes

    def quantized(linear: nn.Linear) -> nn.Module:
        module = bitsandbytes.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=6.0,
            device="meta",
        )
        # from the CPU: bitsandbytes quantizes 8-bit weights only on their way to another place
        module.weight = bitsandbytes.nn.Int8Params(
            linear.weight.data.cpu(), has_fp16_weights=False, requires_grad=False
        )
        module.bias = linear.bias
        return module

    _replace(model, quantized)


def _bitsandbytes_4bit(model: Any) -> None:
    _silence()
    import bitsandbytes

    def quantized(linear: nn.Linear) -> nn.Module:
        module = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype, quant_type="nf4",
            compress_statistics=False, device="meta",
        )  # fmt: skip
        module.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=False,
            module=module,
        )
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

    quantize_(
        model,
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        filter_fn=_chosen(model),
    )


def _gptqmodel_int4(model: Any) -> None:
    with redirect_stdout(StringIO()):  # a banner, and a line for every kernel considered
        from gptqmodel.utils.importer import hf_select_quant_linear_v2

        chosen = {"bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True}
        kernel = hf_select_quant_linear_v2(
            **chosen,
            format="gptq",
            quant_method="gptq",
            dtype=model.dtype,
            pack=False,
            device_map={"": str(model.device)},
            backend="auto",
        )  # as Transformers' loader of GPTQ checkpoints asks

        def quantized(linear: nn.Linear) -> nn.Module:
            sizes = {
                "in_features": linear.in_features,
                "out_features": linear.out_features,
                "bias": linear.bias is not None,
            }
            module = kernel(**chosen, **sizes, pack_dtype=torch.int32)
            for name, tensor in _gptq_tensors(linear, v2=kernel.REQUIRES_FORMAT_V2).items():
                getattr(module, name).copy_(tensor)
            module.to(linear.weight.device).post_init()
            return module

        _replace(model, quantized, decoder_only=True)


def _gptq_tensors(linear: nn.Linear, *, v2: bool) -> dict[str, Tensor]:
    """What a GPTQ checkpoint holds of a symmetric 4-bit module, eight codes to a word; version 1 stores zero points minus one."""
    groups = linear.weight.data.float().unflatten(-1, (-1, _GROUP))
    scale = groups.abs().amax(-1) / 7
    codes = ((groups / scale.unsqueeze(-1)).round() + 8).flatten(1).to(torch.int64)  # [out, in]
    shifts = torch.arange(0, 32, 4, device=codes.device)
    words = (codes.T.unflatten(0, (-1, 8)) << shifts[:, None]).sum(1).to(torch.int32)
    zero = torch.full(
        (scale.shape[1], linear.out_features // 8),
        -0x77777778 if v2 else 0x77777777,
        dtype=torch.int32,
    )
    tensors = {"qweight": words, "qzeros": zero, "scales": scale.T}
    return tensors if linear.bias is None else tensors | {"bias": linear.bias.data}


PEERS = (
    Peer(
        name="bitsandbytes 8-bit",
        package="bitsandbytes",
        quantize=_bitsandbytes_8bit,
        compute="int8",
        share=0.5,
    ),
    Peer(
        name="bitsandbytes 4-bit (nf4)",
        package="bitsandbytes",
        quantize=_bitsandbytes_4bit,
        compute="bfloat16",
        share=0.28,
    ),
    Peer(
        name="torchao int4 weight-only",
        package="torchao",
        quantize=_torchao_int4,
        compute="bfloat16",
        share=0.28,
    ),
    Peer(
        name="torchao int8 dynamic",
        package="torchao",
        quantize=_torchao_int8,
        compute="int8",
        share=0.5,
    ),
    # last: importing it patches Transformers, Triton and the environment
    Peer(
        name="gptqmodel int4 weight-only",
        package="gptqmodel",
        quantize=_gptqmodel_int4,
        compute="bfloat16",
        share=0.45,
    ),
)


def _silence() -> None:
    """Stops the line at every call of every module, which would be timed too."""
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
