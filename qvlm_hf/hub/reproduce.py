"""The one command that repeats a quantization: `qvlm quantize ...` where its options say everything, else a few lines of Python.

Only what shaped the result and differs from the defaults is named. Base model and data set appear
by name, because paths of one machine mean nothing on another; the card gives revision and hash
beside them.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from qvlm_hf.calibration.report import CalibrationReport, settings_dict
from qvlm_hf.calibration.settings import CalibrationSettings, VisionOptimization
from qvlm_hf.format.scheme import parse_scheme

__all__ = ["quantize_command"]

# Settings that `qvlm quantize` has an option for, in its order.
_OPTIONS = (
    "group_size", "seed", "num_samples", "batch_size", "max_block_depth", "rotation", "precision_budget", "modules_to_not_convert",
)  # fmt: skip
_BITS = ("weight_bits", "activation_bits")  # the scheme has them
_NO_EFFECT = ("strict",)
_OF_CALIBRATION = (
    "num_samples",
    "batch_size",
    "max_block_depth",
    "entropy_threshold",
    "percentiles",
    "margins",
)
_IN_MEMORY = " in memory"
_WIDTH = 100  # characters of a line of shell


def quantize_command(
    report: CalibrationReport,
    *,
    scheme: str,
    base: str,
    revision: str | None,
    dtype: str,
    output: str,
) -> tuple[str, str]:
    """Writes the command.

    Args:
        report: its settings and provenance.
        scheme: as "W4A4".
        base: Hub id or directory of the full-precision model.
        revision: of `base` on the Hub, or None.
        dtype: of everything that is not quantized.
        output: directory to name.

    Returns:
        Its language, "bash" or "python", and the text.
    """
    dataset = report.provenance.get("dataset")
    asked = _asked(report.settings, scheme, calibrated=dataset is not None)
    threads = None if dataset is None else report.provenance.get("threads")
    plain = dataset is None and parse_scheme(scheme)[1] < 16
    source: dict[str, Any] = {
        "base": base,
        "revision": revision,
        "dtype": dtype,
        "output": output,
        "threads": threads,
    }
    if set(asked) <= set(_OPTIONS) and not (dataset or "").endswith(_IN_MEMORY):
        return "bash", _shell(scheme, asked, dataset, plain=plain, **source)
    fields = (
        {"scheme": scheme} | ({"activation_granularity": "dynamic_token"} if plain else {}) | asked
    )
    return "python", _python(fields, dataset, **source)


def _asked(settings: Mapping[str, Any], scheme: str, *, calibrated: bool) -> dict[str, Any]:
    """The settings that are not what `scheme` alone would give."""
    bits: dict[str, Any] = dict(zip(_BITS, parse_scheme(scheme), strict=True))
    if calibrated:
        default = CalibrationSettings(**bits)
        skipped: tuple[str, ...] = (*_BITS, *_NO_EFFECT)
    else:  # what QVLMConfig.settle_without_data leaves
        default = CalibrationSettings(
            **bits, activation_granularity=None if bits["activation_bits"] == 16 else "dynamic_token", weight_rounding="nearest",
            equalization=False, token_importance=False, guard=False,
        )  # fmt: skip
        skipped = (
            *_BITS,
            *_NO_EFFECT,
            *_OF_CALIBRATION,
            *(() if settings.get("rotation") else ("seed",)),
        )
    usual = settings_dict(default)
    found = {
        name: [] if name == "modules_to_not_convert" and value is None else value
        for name, value in settings.items()
    }
    return {
        name: value for name, value in found.items() if name not in skipped and value != usual[name]
    }


def _shell(
    scheme: str, asked: Mapping[str, Any], dataset: str | None, *, plain: bool, base: str, revision: str | None, dtype: str, output: str,
    threads: int | None,
) -> str:  # fmt: skip
    """`qvlm quantize`, in lines that are broken before options."""
    options: dict[str, Any] = {
        "revision": revision, "dataset": dataset, "output": output, "scheme": scheme, "method": "rtn" if plain else None, "dtype": dtype,
        **{name: asked[name] or "none" for name in _OPTIONS if name in asked}, "threads": threads,
    }  # fmt: skip
    lines = [f"qvlm quantize {shlex.quote(base)}"]
    for name, value in options.items():
        if value is not None:
            words = shlex.join(
                [
                    f"--{name.replace('_', '-')}",
                    *map(str, value if isinstance(value, list) else [value]),
                ]
            )
            if len(lines[-1]) + len(words) < _WIDTH:
                lines[-1] += f" {words}"
            else:
                lines.append(f"    {words}")
    return " \\\n".join(lines)


def _python(
    fields: Mapping[str, Any],
    dataset: str | None,
    *,
    base: str,
    revision: str | None,
    dtype: str,
    output: str,
    threads: int | None,
) -> str:
    source = _literal(base) + ("" if revision is None else f", revision={_literal(revision)}")
    arguments = [f"{name}={_literal(_usual(name, value))}" for name, value in fields.items()]
    if dataset is not None:
        samples = "samples" if dataset.endswith(_IN_MEMORY) else _literal(dataset)
        arguments[1:1] = [f"dataset={samples}", "processor=processor"]
    lines = [
        *(["import torch"] if threads is not None else []),
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        "import qvlm_hf",
        "",
        *([f"torch.set_num_threads({threads})"] if threads is not None else []),
        f"processor = AutoProcessor.from_pretrained({source})",
        "config = qvlm_hf.QVLMConfig(",
        *(f"    {argument}," for argument in arguments),
        ")",
        "model = AutoModelForImageTextToText.from_pretrained(",
        f"    {source}, dtype={_literal(dtype)}, quantization_config=config",
        ")",
        f"qvlm_hf.save_quantized(model, processor, {_literal(output)}, "
        f"report=model.hf_quantizer.report)",
    ]
    return "\n".join(lines)


def _usual(name: str, value: Any) -> Any:
    """True for the usual visual encoder optimisation, whose fields nobody wants to read."""
    usual = settings_dict(CalibrationSettings(optimize_vision=VisionOptimization()))
    return True if name == "optimize_vision" and value == usual[name] else value


def _literal(value: Any) -> str:
    """A value as Python writes it, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return (
            f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
        )
    return repr(value)
