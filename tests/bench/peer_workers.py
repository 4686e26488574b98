"""Quantizes a model with one package and writes what it answers; `peer_accuracy.py` runs it.

    python tests/bench/peer_workers.py FOLDER METHOD...

It runs in the package's own environment, so only our own rows import qvlm_hf. FOLDER holds job.json
and the inputs as tensors, and gets METHOD.safetensors, the logits. For every method a line of JSON
is printed: seconds, the modules that were quantized and versions, or its error.
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["METHODS", "PINS", "Method", "answers", "read_inputs", "texts"]

Batches = list[dict[str, Tensor]]
_SHARED = ["torch==2.13.0", "transformers==5.24.0", "pillow==13.0.0"]
PINS = {
    "torchao": [*_SHARED, "torchao==0.18.0"],
    "bitsandbytes": [*_SHARED, "bitsandbytes==0.50.2", "accelerate==1.15.0"],
    "hqq": [*_SHARED, "hqq==0.2.8.post1"],
    "optimum-quanto": [*_SHARED, "optimum-quanto==0.2.7"],
    "llmcompressor": ["torch==2.13.0", "transformers==5.17.0", "llmcompressor==0.14.0.1"],
    "auto-round": [*_SHARED, "auto-round==0.16.1"],
    "gptqmodel": ["torch==2.14.1", "transformers==5.24.0", "gptqmodel==7.7.0"],
}


@dataclass(frozen=True)
class Method:
    """A package at one scheme.

    Attributes:
        package: key of `PINS`, or "qvlm_hf".
        scheme: bits of weights and inputs.
        how: the algorithm and the format of its weights, for the table.
        quantize: job -> the quantized model, from `load` or its own loader.
        overhead: bits of scales and zero points, for every group of weights.
        group: weights of a group where the package does not take the job's; 0 is a row.
        calibrated: uses samples, so that another seed gives another model.
    """

    package: str
    scheme: str
    how: str
    quantize: Callable[[Any], Any]
    overhead: int = 16
    group: int | None = None
    calibrated: bool = False


# ---- what is measured ----------------------------------------------------------------------------
# Without gradients, but not in inference mode: quanto packs weights when they are first used.


def read_inputs(path: Path) -> dict[str, Batches]:
    """The tensors that `peer_accuracy.py` wrote: part -> batches of a model's arguments."""
    from safetensors.torch import load_file

    parts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in load_file(path).items():
        part, index, key = name.split("/")
        parts.setdefault(part, {}).setdefault(int(index), {})[key] = tensor
    return {part: [found[i] for i in sorted(found)] for part, found in parts.items()}


@torch.no_grad()
def answers(model: Any, batches: Batches) -> Tensor:
    """Logits [tokens, vocabulary] that predict the labelled tokens of padded batches."""
    found = []
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        answered = batch["labels"][:, 1:] != -100
        found.append(model(**inputs).logits[:, :-1][answered].float())
    return torch.cat(found)


@torch.no_grad()
def texts(model: Any, batches: Batches) -> Tensor:
    """Logits [tokens, vocabulary] that predict each text from its second token on."""
    return torch.cat([model(**batch).logits[0, :-1].float() for batch in batches])


def linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear module but the output head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            yield name, module


def quantized(full: Any, model: Any, *, by_type: bool) -> str:
    """How many linear modules of each part are quantized.

    Those of another type, or with another type of weight. Some packages keep nn.Linear and change
    its values; with `by_type` that does not count, since our equalization does so too.
    """
    found: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, linear in linears(full):
        part = next((p for p in ("vision", "projector") if p in name), "language")
        module = model.get_submodule(name)
        same = type(module) is nn.Linear and type(module.weight.data) is Tensor
        if same and not by_type:
            same = torch.equal(module.weight.data, linear.weight.data)
        total[part] += 1
        found[part] += not same
    return ", ".join(f"{part} {found[part]}/{count}" for part, count in total.items())


# ---- the packages --------------------------------------------------------------------------------


def load(path: str, **options: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        path, **{"dtype": torch.float32, **options}
    ).eval()


def ours(**fields: Any) -> Callable[[Any], Any]:
    def quantize(job: Any) -> Any:
        from transformers import AutoProcessor

        from qvlm_hf import QVLMConfig

        chosen = {"group_size": job.group, "num_samples": job.samples, "seed": job.seed}
        given = {"dataset": job.data, "processor": AutoProcessor.from_pretrained(job.model)}
        config = QVLMConfig(**{"recipe": "fixed", **chosen, **given, **job.fields, **fields})
        return load(job.model, quantization_config=config)

    return quantize


def torchao(name: str, **options: Any) -> Callable[[Any], Any]:
    def quantize(job: Any) -> Any:
        from torchao import quantization
        from torchao.quantization.granularity import PerGroup

        if name != "Int8DynamicActivationInt8WeightConfig":
            key = "granularity" if name == "IntxWeightOnlyConfig" else "weight_granularity"
            options.update({"weight_dtype": torch.int4, key: PerGroup(job.group)})
        if "mapping_type" in options:
            options["mapping_type"] = quantization.MappingType[options["mapping_type"]]
        model = load(job.padded)
        names = {name for name, _ in linears(model)}
        quantization.quantize_(
            model, getattr(quantization, name)(**options), filter_fn=lambda _, fqn: fqn in names
        )
        return model

    return quantize


def bitsandbytes(**options: Any) -> Callable[[Any], Any]:
    def quantize(job: Any) -> Any:
        from transformers import BitsAndBytesConfig

        chosen = BitsAndBytesConfig(**options)
        model = load(job.padded, quantization_config=chosen, device_map="cpu")
        for module in model.modules():
            # else CPUs with AVX512-BF16 pack its rows again, and fail where 64 does not divide them
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    return quantize


def hqq(job: Any) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = load(job.padded)
    for name, linear in list(linears(model)):
        config = BaseQuantizeConfig(nbits=4, group_size=job.group, axis=1)
        module = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        model.set_submodule(name, module)
    return model


def quanto(weights: str, activations: str | None = None) -> Callable[[Any], Any]:
    def quantize(job: Any) -> Any:
        from optimum import quanto

        model = load(job.padded)
        names = [name for name, _ in linears(model)]
        types = {"weights": getattr(quanto, weights)}
        if activations is not None:
            types["activations"] = getattr(quanto, activations)
        quanto.quantize(model, include=names, **types)
        if activations is not None:
            with quanto.Calibration():
                answers(model, job.calibration)
        quanto.freeze(model)
        return model

    return quantize


def llmcompressor(bits: str, *, language: bool, smooth: bool = False) -> Callable[[Any], Any]:
    """SmoothQuant on the language model's norms, then GPTQ; `bits` as in METHODS."""

    def quantize(job: Any) -> Any:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        model = load(job.padded)
        weights = {"num_bits": int(bits[1]), "type": "int", "symmetric": True}
        rows = bits.startswith("W8")
        weights |= (
            {"strategy": "channel"} if rows else {"strategy": "group", "group_size": job.group}
        )
        group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
        if not bits.endswith("A16"):
            inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
            group["input_activations"] = {**inputs, "symmetric": True}
        left_out = ["re:.*vision_tower.*", "re:.*multi_modal_projector.*"] if language else []
        recipe: list[Any] = [
            GPTQModifier(config_groups={"group_0": group}, ignore=["re:.*lm_head", *left_out])
        ]
        if smooth:
            reads = {"input_layernorm": "[qkv]_proj", "post_attention_layernorm": "(gate|up)_proj"}
            start = "re:.*language_model.*"
            mappings = [[[start + linears], start + norm] for norm, linears in reads.items()]
            recipe.insert(0, SmoothQuantModifier(smoothing_strength=0.8, mappings=mappings))
        # padding would count in Hessians
        samples = one_by_one(job.calibration, model.config.image_token_id)
        data = torch.utils.data.DataLoader(samples, batch_size=None)
        layer = type(model.get_decoder().layers[0]).__name__
        oneshot(
            model=model, dataset=data, recipe=recipe, sequential_targets=[layer],
            processor=job.padded, num_calibration_samples=len(samples),
            # the other pipeline finds no statistics for modules of a tower
            pipeline="sequential" if language else "basic",
        )  # fmt: skip
        return model

    return quantize


def gptqmodel(job: Any) -> Any:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader fails where there is one
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=job.group, device="cpu", offload_to_disk=False)
    half: dict[str, Any] = {"device": "cpu", "dtype": torch.float16}  # it takes no float32
    full = load(job.padded)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # it leaves logs
        model = GPTQModel.load(job.padded, config, dtype=half["dtype"])
        model.quantize(job.chats, batch_size=1)
        model.save(folder)
        saved = GPTQModel.load(folder, backend=BACKEND.TORCH, **half).model
    for name, linear in linears(full):  # answered in float32, as all others are
        module = saved.get_submodule(name)
        if hasattr(module, "dequantize_weight"):
            linear.weight.data = module.dequantize_weight().T.float().contiguous()
    return full


def auto_round(*, language: bool) -> Callable[[Any], Any]:
    def quantize(job: Any) -> Any:
        from auto_round import AutoRound
        from transformers import AutoProcessor

        model, processor = load(job.padded), AutoProcessor.from_pretrained(job.padded)
        data = one_by_one(job.calibration, model.config.image_token_id)
        rounding = AutoRound(
            model, tokenizer=processor.tokenizer, processor=processor, scheme="W4A16",
            group_size=job.group, sym=True, quant_nontext_module=not language, iters=200,
            dataset=torch.utils.data.DataLoader(data, batch_size=None), nsamples=len(data),
            batch_size=1, gradient_accumulate_steps=8, seqlen=64, device_map="cpu", seed=job.seed,
            enable_torch_compile=False,
        )  # fmt: skip
        return rounding.quantize()[0]

    return quantize


def one_by_one(batches: Batches, image_token: int) -> Batches:
    """Every row with a picture as a batch of its own, without padding.

    Rows without one are left out: packages trace the model on the arguments of the first.
    """
    rows = []
    for batch in batches:
        shown = (batch["input_ids"] == image_token).any(1).nonzero().flatten().tolist()
        for row, picture in zip(shown, batch.get("pixel_values", ()), strict=True):
            length = int(batch["attention_mask"][row].sum())
            tokens = {
                name: tensor[row : row + 1, :length]
                for name, tensor in batch.items()
                if tensor.dim() == 2 and name != "labels"
            }
            rows.append({**tokens, "pixel_values": picture[None]})
    return rows


def _our_methods() -> Iterator[Method]:
    rotated = {"activation_granularity": "dynamic_token", "rotation": "hadamard"}
    auto, symmetric = {"recipe": "auto"}, {"symmetric": True}
    language = {"quantize_vision": False, "quantize_projector": False}
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("W8A8", "defaults", {}),
        ("W8A8", "defaults, language model alone", language),
        ("W8A8", "auto", auto),
        ("W4A16", "auto", auto),
        ("W4A16", "auto, language model alone", auto | language),
        ("W4A16", "auto, no zero points", auto | symmetric),
        ("W4A16", "auto, no zero points, language model alone", auto | symmetric | language),
        ("W4A8", "defaults", {}),
        ("W4A8", "auto", auto),
        ("W4A4", "defaults", {}),
        ("W4A4", "auto", auto),
        ("W4A4", "QuaRot's kind: rotation, dynamic, GPTQ", rotated),
    ]
    for scheme, how, fields in variants:
        rows = scheme == "W8A8"  # 8-bit weights have a scale a row in every package
        quantize = ours(scheme=scheme, **fields, **({"group_size": -1} if rows else {}))
        overhead = 16 if fields.get("symmetric") else 16 + 8
        yield Method("qvlm_hf", scheme, how, quantize, overhead, 0 if rows else None, True)


def _peer_methods() -> Iterator[Method]:
    per_token, per_module = "rounded, inputs per token", "rounded, a range per module"
    with_zero_points, without = "rounded, zero points", "no zero points"
    int8_rows, int4_groups = (
        torchao(f"Int8DynamicActivation{kind}WeightConfig") for kind in ("Int8", "Intx")
    )
    int4 = torchao("IntxWeightOnlyConfig")
    uint4 = torchao("IntxWeightOnlyConfig", mapping_type="ASYMMETRIC")
    yield Method("torchao", "W8A8", per_token, int8_rows, group=0)
    yield Method("torchao", "W4A16", f"rounded, {without}", int4)
    yield Method("torchao", "W4A16", with_zero_points, uint4, overhead=16 + 8)
    yield Method("torchao", "W4A8", per_token, int4_groups)
    int8 = bitsandbytes(load_in_8bit=True)
    nf4 = bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    outliers = "LLM.int8, outliers above 6 in fp16"
    yield Method("bitsandbytes", "W8A8", outliers, int8, group=0)
    yield Method("bitsandbytes", "W4A16", "nf4", nf4, overhead=32, group=64)
    yield Method("hqq", "W4A16", "HQQ, zero points", hqq, overhead=16 + 16)
    quanto8, quanto4a8 = quanto("qint8", "qint8"), quanto("qint4", "qint8")
    yield Method("optimum-quanto", "W8A8", per_module, quanto8, group=0, calibrated=True)
    yield Method("optimum-quanto", "W4A16", with_zero_points, quanto("qint4"), overhead=16 + 16)
    yield Method("optimum-quanto", "W4A8", per_module, quanto4a8, overhead=16 + 16, calibrated=True)
    for language in (False, True):
        scope = ", language model alone" if language else ""
        smooth = llmcompressor("W8A8", language=language, smooth=True)
        gptq, rounding = llmcompressor("W4A16", language=language), auto_round(language=language)
        how = f"SmoothQuant, GPTQ{scope}"
        yield Method("llmcompressor", "W8A8", how, smooth, group=0, calibrated=True)
        yield Method("llmcompressor", "W4A16", f"GPTQ, {without}{scope}", gptq, calibrated=True)
        yield Method("auto-round", "W4A16", f"{without}{scope}", rounding, calibrated=True)
    smooth = llmcompressor("W4A8", language=False, smooth=True)
    yield Method("llmcompressor", "W4A8", "SmoothQuant, GPTQ", smooth, calibrated=True)
    how = f"GPTQ, {without}, language model alone"
    yield Method("gptqmodel", "W4A16", how, gptqmodel, calibrated=True)


METHODS = {
    f"{method.package} {method.scheme} {method.how}": method
    for method in (*_our_methods(), *_peer_methods())
}


def measure(name: str, job: Any, folder: Path) -> dict[str, Any]:
    """Writes NAME's logits beside the job, and says how it went."""
    from safetensors.torch import save_file

    method = METHODS[name]
    torch.manual_seed(job.seed)
    start = time.process_time()
    model = method.quantize(job)
    seconds = time.process_time() - start
    full = load(job.model if method.package == "qvlm_hf" else job.padded)
    logits = {"answers": answers(model, job.test), "text": texts(model, job.text)}
    save_file({**logits, "full": texts(full, job.text)}, folder / f"{name}.safetensors")
    packages = {"torch", "transformers", method.package} - {"qvlm_hf"}
    return {
        "seconds": round(seconds, 1),
        "modules": quantized(full, model, by_type=method.package == "qvlm_hf"),
        "versions": {package: version(package) for package in sorted(packages)},
    }


def main() -> None:
    folder = Path(sys.argv[1])
    inputs = read_inputs(folder / "inputs.safetensors")
    job = SimpleNamespace(**json.loads((folder / "job.json").read_text()), **inputs)
    for name in sys.argv[2:]:
        try:
            found = measure(name, job, folder)
        except Exception as error:
            logging.exception(name)
            lines = str(error).strip().splitlines() or [""]
            found = {"error": f"{type(error).__name__}: {lines[0][:300]}"}
        print("\n" + json.dumps({"method": name, **found}), flush=True)


if __name__ == "__main__":
    main()
