"""The one command that repeats a quantization: `qvlm quantize ...` where its options say everything, else a few lines of Python.

Only what shaped the result and differs from the defaults is named. Base model and data set appear by name, because paths of one machine
mean nothing on another; the card gives revision and hash beside them.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from qvlm_hf.calibration.report import CalibrationReport, settings_dict
from qvlm_hf.calibration.settings import CalibrationSettings, VisionOptimization
from qvlm_hf.core.scheme import parse_scheme

__all__ = ["quantize_command"]

# Settings that `qvlm quantize` has an option for, in its order.
_OPTIONS = (
    "group_size", "seed", "num_samples", "batch_size", "max_block_depth", "rotation", "precision_budget", "modules_to_not_convert",
)  # fmt: skip
_PLAIN_OPTIONS = ("group_size", "seed")  # those that go with --method rtn
_BITS = ("weight_bits", "activation_bits")  # the scheme has them
_NO_EFFECT = ("strict",)
_OF_CALIBRATION = ("num_samples", "batch_size", "max_block_depth", "entropy_threshold", "percentiles", "margins")
_IN_MEMORY = " in memory"
_WIDTH = 100  # characters of a line of shell


def quantize_command(
    report: CalibrationReport, *, scheme: str, base: str, revision: str | None, dtype: str, output: str
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
    plain = dataset is None and parse_scheme(scheme)[1] < 16
    in_memory = dataset is not None and dataset.endswith(_IN_MEMORY)
    threads = None if dataset is None else report.provenance.get("threads")
    if revision is None and not in_memory and set(asked) <= set(_PLAIN_OPTIONS if plain else _OPTIONS):
        words = ["qvlm", "quantize", base]
        words += [] if dataset is None else ["--dataset", dataset]
        words += ["--output", output, "--scheme", scheme, *(("--method", "rtn") if plain else ()), "--dtype", dtype]
        for name in (name for name in _OPTIONS if name in asked):
            value = asked[name]
            words += [
                f"--{name.replace('_', '-')}",
                *map(str, value if isinstance(value, list) else [value or "none"] if name == "rotation" else [value]),
            ]
        words += [] if threads is None else ["--threads", str(threads)]
        return "bash", _wrapped(words)
    fields = {"scheme": scheme} | ({"activation_granularity": "dynamic_token"} if plain else {}) | asked
    return "python", _python(
        fields, dataset=dataset, in_memory=in_memory, base=base, revision=revision, dtype=dtype, output=output, threads=threads
    )


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
        skipped = (*_BITS, *_NO_EFFECT, *_OF_CALIBRATION, *(() if settings.get("rotation") else ("seed",)))
    usual = settings_dict(default)
    found = {name: [] if name == "modules_to_not_convert" and value is None else value for name, value in settings.items()}
    return {name: value for name, value in found.items() if name not in skipped and value != usual[name]}


def _wrapped(words: list[str]) -> str:
    """A command in lines, broken before options."""
    lines = [" ".join(map(shlex.quote, words[:3]))]
    for word in map(shlex.quote, words[3:]):
        if word.startswith("--") and len(lines[-1]) > _WIDTH - 30:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    return " \\\n".join(lines)


def _python(
    fields: Mapping[str, Any], *, dataset: str | None, in_memory: bool, base: str, revision: str | None, dtype: str, output: str,
    threads: int | None,
) -> str:  # fmt: skip
    source = repr(base) + ("" if revision is None else f", revision={revision!r}")
    arguments = [f"{name}={_value(name, value)}" for name, value in fields.items()]
    if dataset is not None:
        arguments[1:1] = ["dataset=samples" if in_memory else f"dataset={dataset!r}", "processor=processor"]
    lines = ["import torch"] if threads is not None else []
    lines += ["from transformers import AutoModelForImageTextToText, AutoProcessor", "", "import qvlm_hf", ""]
    lines += [f"torch.set_num_threads({threads})"] if threads is not None else []
    lines += [f"processor = AutoProcessor.from_pretrained({source})", "config = qvlm_hf.QVLMConfig("]
    lines += [f"    {argument}," for argument in arguments]
    lines += [
        ")",
        f"model = AutoModelForImageTextToText.from_pretrained({source}, dtype={dtype!r}, quantization_config=config)",
        f"qvlm_hf.save_quantized(model, processor, {output!r}, report=model.hf_quantizer.report)",
    ]
    return "\n".join(lines)


def _value(name: str, value: Any) -> str:  # noqa: ANN401 - any setting
    usual = settings_dict(CalibrationSettings(optimize_vision=VisionOptimization()))["optimize_vision"]
    return "True" if name == "optimize_vision" and value == usual else repr(value)
