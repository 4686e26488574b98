"""Loading models and making configurations for the commands, without the library's own chatter."""

import argparse
from collections.abc import Callable
from dataclasses import Field
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from qvlm_hf.errors import first_line
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.processor_fit import check_processor_fits
from qvlm_hf.hub.saved import SavedModel, empty_model
from qvlm_hf.models.graph import shared_inputs

__all__ = [
    "METHODS",
    "add_field_arguments",
    "add_scheme_arguments",
    "check_fits",
    "load_model",
    "load_processor",
    "load_with_processor",
    "make_config",
    "read_config",
    "read_full_precision",
    "read_loadable",
    "search_options",
    "silence",
]

METHODS = ("qvlm", "rtn")
_FLAGS: dict[str, Field[Any]] = {
    each.name: each for each in fields_of(QVLMConfig) if each.metadata["flag"]
}
# What a processor is loaded from: one file of each row, the first in new directories.
_PROCESSOR_FILES = (
    ("processor_config.json", "preprocessor_config.json"),
    ("tokenizer.json", "tokenizer.model"),
)


def search_options() -> list[str]:
    """The fields that only the search on samples uses; the command line gives None or False."""
    return [name for name, each in _FLAGS.items() if each.metadata["flag"].search]


def add_field_arguments(parser: argparse.ArgumentParser, *names: str) -> None:
    """Declares the options of fields of `QVLMConfig`; what only the search uses has no default."""
    for name in names:
        each, flag = _FLAGS[name], _FLAGS[name].metadata["flag"]
        word, text = f"--{name.replace('_', '-')}", flag.help
        if each.default is False:
            parser.add_argument(word, action="store_true", help=text)
            continue
        if each.default is True:
            switch = argparse.BooleanOptionalAction
            parser.add_argument(
                word, action=switch, default=None if flag.search else True, help=text
            )
            continue
        if each.default is not None:
            text += f" (default: {each.default})"
        several: dict[str, Any] = {"nargs": "*"} if name == "modules_to_not_convert" else {}
        parser.add_argument(
            word,
            default=None if flag.search else each.default,
            type=_reader(get_args(each.type) or (each.type,)),
            metavar=flag.metavar,
            choices=flag.choices or None,
            help=text,
            **several,
        )


def _reader(kinds: tuple[Any, ...]) -> Callable[[str], Any]:
    """What makes a value of these types of a word of the command line."""
    if {float, str} <= {*kinds}:
        return _number_or_word
    return next((kind for kind in (int, float) if kind in kinds), str)


def _number_or_word(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def add_scheme_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how to quantize."""
    add_field_arguments(parser, "scheme")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="qvlm",
        help="qvlm: the search; rtn: plain rounding, no data (default: qvlm)",
    )
    add_field_arguments(parser, "group_size", "symmetric", "seed")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier result in the output directory"
    )


def make_config(options: argparse.Namespace, **search: Any) -> QVLMConfig:
    """The configuration that the options ask for.

    `search` are fields that only the search uses; plain rounding does without them.

    Raises:
        ValueError: a field breaks a rule, or asks plain rounding for static ranges.
    """
    given = {name: v for name in _FLAGS if (v := getattr(options, name, None)) is not None}
    fields: dict[str, Any] = {
        name: None if value == "none" else value for name, value in given.items()
    }
    if options.method == "qvlm":
        return QVLMConfig(**fields | search)
    fields = {name: value for name, value in fields.items() if name not in search_options()}
    if fields.get("activation_granularity") == "channel":
        raise ValueError(
            "--activation-granularity channel has ranges to calibrate: leave it out with --method "
            "rtn."
        )
    if QVLMConfig(**fields).activation_bits != 16:
        fields.setdefault("activation_granularity", "dynamic_token")
    return QVLMConfig(**fields, weight_rounding="nearest")


def silence() -> None:
    """Turns off Transformers' bars and notices: the commands report by themselves."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_model(
    name: str,
    config: QVLMConfig | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    **loading: Any,
) -> Any:
    """A model from a directory or the Hub, quantized on the way if there is a configuration."""
    silence()
    (read_loadable if config is None else read_full_precision)(name, revision)
    options = loading if config is None else loading | {"quantization_config": config}
    return AutoModelForImageTextToText.from_pretrained(
        name, dtype=dtype, revision=revision, **options
    )


def load_with_processor(name: str) -> tuple[Any, Any]:
    """A model and its processor, which is seen to fit before a weight is read.

    Raises:
        ValueError: it does not, with the file and the key to mend.
    """
    silence()
    read_loadable(name)
    processor = load_processor(name)
    check_fits(name, processor)
    return load_model(name), processor


def check_fits(name: str, processor: Any) -> None:
    """Checks a processor against the configuration of a model of a known family.

    Raises:
        ValueError: as `check_processor_fits`, with the model's name.
    """
    model = empty_model(read_config(name))
    # without a padding token one question can still be asked
    if (
        not shared_inputs(model)
        or getattr(getattr(processor, "tokenizer", None), "pad_token", None) is None
    ):
        return
    try:
        check_processor_fits(model, processor, None)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def read_loadable(name: str, revision: str | None = None) -> Any:
    """The configuration of a model that the commands can load; `name` may be a config.json too.

    Raises:
        ValueError: it is of another kind, or its directory is damaged; as `read_config`.
    """
    kind = read_config(name, revision)
    if type(kind) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"{name}: model_type {kind.model_type!r} is no image-text-to-text model: give one."
        )
    if Path(name).is_dir():
        SavedModel(name).check_weights()
    return kind


def read_full_precision(name: str, revision: str | None = None) -> Any:
    """As `read_loadable`, of a model that is to be quantized.

    Raises:
        ValueError: it is quantized already.
    """
    kind = read_loadable(name, revision)
    if getattr(kind, "quantization_config", None) is not None:
        raise ValueError(f"{name}: is quantized already: give the full-precision model.")
    return kind


def read_config(name: str, revision: str | None = None) -> Any:
    """The configuration of a model in a directory or on the Hub.

    Raises:
        ValueError: a directory has none.
        OSError: there is none; as ConnectionError if the Hub cannot be asked.
    """
    _check_reachable(name, revision)
    if Path(name).is_dir():
        _ = SavedModel(name).config_json
    return AutoConfig.from_pretrained(name, revision=revision)


def _check_reachable(name: str, revision: str | None) -> None:
    """Asks the Hub once for a model that is neither here nor in the cache.

    Transformers asks again and again, for 23 seconds.
    """
    if Path(name).exists():
        return
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # no Hub id either, which Transformers says
        return
    if cached is not None:
        return
    if is_offline_mode():
        raise ConnectionError(
            f"{name}: is no directory here and not in the cache, and offline mode is on "
            f"(HF_HUB_OFFLINE): check the name, or unset it."
        )
    try:
        HfApi().file_exists(name, "config.json", revision=revision)
    except HfHubHTTPError:  # an answer, which Transformers explains
        return
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"{name}: is no directory here, and the Hub cannot be reached ({first_line(error)}): "
            f"check the name and the network."
        ) from error


def load_processor(name: str, revision: str | None = None) -> Any:
    """Its processor.

    Raises:
        ValueError: a directory holds none that loads; says which file is missing, if one is. Or
            it is a file.
        OSError: there is none on the Hub; as ConnectionError if the Hub cannot be asked.
    """
    silence()
    if Path(name).is_file():  # Transformers would ask the Hub for it, again and again
        raise ValueError(f"{name}: is a file: name the directory of the model.")
    _check_reachable(name, revision)
    try:
        return AutoProcessor.from_pretrained(name, revision=revision)
    except Exception as error:  # a damaged file may raise anything
        if not Path(name).is_dir():
            raise
        missing = next(
            (
                files[0]
                for files in _PROCESSOR_FILES
                if not any((Path(name) / file).is_file() for file in files)
            ),
            None,
        )
        reason = f"{missing} is missing" if missing else first_line(error)
        raise ValueError(
            f"{name}: holds no processor that loads ({reason}): copy the model's processor files "
            f"there."
        ) from error
