"""`QVLMConfig`: what the user asks for, and what `quantization_config` in config.json says.

Three kinds of fields: options that shape the result (`calibration/options.py`), results of
quantizing (`modules` and `provenance`), and what belongs to this process (`dataset`, `processor`,
`callbacks`, where to publish). The last kind is never written. AutoModel copies the configuration
deeply at every call, so objects of this process are shared by reference.
"""

import copy
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import wraps
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from qvlm_hf.calibration.options import SWITCHED_OFF, Flag, Options, VisionOptimization, option
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.calibration.values import shown, to_plain
from qvlm_hf.format.scheme import QuantScheme, parse_scheme
from qvlm_hf.hf.checked_fields import (
    FORMAT_VERSION,
    check_version,
    checked_callbacks,
    checked_folder,
    checked_modules,
    checked_provenance,
    checked_publishing,
)
from qvlm_hf.hf.registry import QUANT_METHOD, config_class

__all__ = ["FORMAT_VERSION", "PAPER", "QVLMConfig"]

# The fields of `QVLMConfig.paper` but its visual encoder optimisation.
PAPER: dict[str, Any] = {
    **SWITCHED_OFF,
    "rotation": None,
    "percentiles": (1.0, 0.995, 0.99, 0.985, 0.98),
    "margins": (),
    "activation_granularity": {"vision": "token", "projector": "channel", "language": "channel"},
}
_SHARED = ("dataset", "processor", "callbacks")
_OPTIONS = tuple(each.name for each in fields(Options))


def _with_names_checked(cls: Any) -> Any:
    """Refuses what is no field in one line, and lists the fields in the docstring."""
    init = cls.__init__

    @wraps(init)
    def checked(self: Any, **given: Any) -> None:
        for name in given.keys() - _FIELDS:
            _check_attribute(name)
            raise ValueError(
                f"QVLMConfig has no field {name!r}: the fields are {', '.join(sorted(_FIELDS))}."
            )
        init(self, **given)

    cls.__init__ = checked
    docs = {each.name: each.metadata["doc"] for each in fields(cls)}
    order = dict.fromkeys(("scheme", "dataset", "processor", *_OPTIONS, *docs))
    lines = [f"{name}: {docs[name]}" for name in order]
    text = "\n".join(
        textwrap.fill(line, 100, initial_indent="    ", subsequent_indent="        ")
        for line in lines
    )
    cls.__doc__ = f"{inspect.getdoc(cls)}\n\nAttributes:\n{text}\n"
    return cls


def _of_this_process(default: Any, doc: str, flag: Flag | None = None) -> Any:
    return option(default, None, f"{doc} Never saved.", flag=flag, saved=False)


@config_class
@_with_names_checked
@dataclass(kw_only=True, eq=False, repr=False)
class QVLMConfig(Options, QuantizationConfigMixin):
    """How a vision-language model is quantized.

    Every field of config.json is a plain value, whatever was given (NumPy, PyTorch, sets,
    iterators).

    Raises:
        ValueError: an unknown field, or a value that breaks a rule, with the remedy: at
            construction, in `from_dict` and `update`, and when a field is assigned.
    """

    scheme: str = option(
        "W4A4",
        None,
        "any W{2-8}A{3-8,16}: bits of weights and of the inputs of linear modules.",
        flag=Flag("bits of weights and activations, W{2-8}A{3-8,16}", "SCHEME"),
    )
    dataset: Any = _of_this_process(
        None,
        'calibration samples: a path, a Hub id, a list, a Dataset or another iterable; "synthetic" '
        "draws pictures and lets the model answer.",
        Flag("calibration samples: .jsonl, .json, ScienceQA folder or Hub id", "F", search=True),
    )
    processor: Any = _of_this_process(None, "of the model; turns samples into inputs.")
    callbacks: Any = _of_this_process(
        (),
        "objects with `on_step(name, done, total)` or `on_calibration_end(model, report)`. An "
        "error in the first leaves the model unquantized; one in the second comes after the work: "
        "`quantize_model` leaves the model quantized, `from_pretrained` returns none, and nothing "
        "is published.",
    )
    push_to_hub: bool = _of_this_process(
        False,
        "publish the result when quantizing ends, as `publish` does; "
        "`model.hf_quantizer.published` says where. Needs `hub_model_id` and `processor`. A "
        "failure is a warning that names the saved directory.",
    )
    hub_model_id: str | None = _of_this_process(
        None, '"owner/name" to publish to, or a "name" among your own.'
    )
    hub_private: bool | None = _of_this_process(
        None, "of that repository; None takes the owner's default, or leaves it as it is."
    )
    resume_dir: Any = _of_this_process(
        None,
        "directory to keep finished steps of calibration in: the same call goes on where a stopped "
        "one was, with the same result. Delete it when the result is saved.",
    )
    scratch_dir: Any = _of_this_process(
        None,
        "directory on a disk for what calibration would hold in memory: changed and quantized "
        "weights, hidden states, gradients. They are mapped from files without names, with the "
        "same result; so is the quantized model until the process ends.",
        flag=Flag("hold weights and hidden states in files there", "DIR", search=True),
    )
    modules: Any = option(
        None,
        None,
        "canonical module name -> `QuantScheme` of every quantized module; filled by quantizing.",
    )
    provenance: Any = option(
        None,
        None,
        "what the quantization was made from (dataset, hash, counts, versions); filled by "
        "quantizing.",
    )
    quant_method: Any = option(QUANT_METHOD, None, 'always "qvlm".')
    format_version: int = option(FORMAT_VERSION, None, "of the files (docs/format.md).")

    def __post_init__(self) -> None:
        given = self.__dict__
        check_version(to_plain("format_version", self.format_version))
        if to_plain("quant_method", self.quant_method) != QUANT_METHOD:
            raise ValueError(
                f"quant_method={shown(self.quant_method)} must be {QUANT_METHOD!r}: this is "
                f"another method's configuration."
            )
        given |= {
            "quant_method": QUANT_METHOD,  # a str, as in every plugin; in-tree methods have an enum
            "scheme": "W{}A{}".format(*parse_scheme(to_plain("scheme", self.scheme))),
            "callbacks": checked_callbacks(self.callbacks),
            "resume_dir": checked_folder("resume_dir", self.resume_dir),
            "scratch_dir": checked_folder("scratch_dir", self.scratch_dir),
            "modules": checked_modules(self.modules),
            "provenance": checked_provenance(self.provenance),
            **checked_publishing(self.push_to_hub, self.hub_model_id, self.hub_private),
        }
        if self.weight_rounding == "learned" and not self.modules:
            raise ValueError(
                "weight_rounding='learned' was removed, it gained nothing: take 'gptq'. Saved "
                "models still load."
            )
        excluded = self.modules_to_not_convert
        settings = self.settings()  # raises where a value breaks a rule
        given |= {name: getattr(settings, name) for name in _OPTIONS}
        if excluded is None:
            given["modules_to_not_convert"] = None

    @classmethod
    def paper(cls, scheme: str = "W4A4", **overrides: Any) -> "QVLMConfig":
        """What the Q-VLM paper (arXiv 2410.08119) has, and nothing besides.

        That is its percentiles, granularities and visual encoder optimisation. Rounding is to
        nearest; guard, token importance, equalization and rotation are off.

        Args:
            scheme: as in `QVLMConfig`.
            **overrides: any field of `QVLMConfig`.

        Raises:
            ValueError: as `QVLMConfig`.
        """
        chosen = PAPER | {"optimize_vision": True}
        if parse_scheme(scheme)[1] == 16:  # nothing of an input is quantized
            chosen["activation_granularity"] = None
        return cls(scheme=scheme, **(chosen | overrides))

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Reads a configuration as `to_dict` wrote it.

        Args:
            config_dict: the fields.
            return_unused_kwargs: hand back what of `kwargs` are no fields, instead of refusing it.
            **kwargs: fields that replace those of `config_dict`.

        Raises:
            ValueError: a field is unknown or breaks a rule: the file is newer than this version, or
                damaged.
        """
        if not isinstance(config_dict, Mapping):
            raise ValueError(
                f"quantization_config={shown(config_dict)} must be a mapping of fields, as "
                f"to_dict() gives it."
            )
        check_version(config_dict.get("format_version", FORMAT_VERSION))
        unknown = sorted(set(config_dict) - set(_FIELDS), key=str)
        if unknown:
            raise ValueError(
                f"quantization_config has the unknown fields {unknown}: the file is damaged or "
                f"from a newer qvlm_hf (then upgrade)."
            )
        unused = {}
        if return_unused_kwargs:
            unused = {name: kwargs.pop(name) for name in kwargs.keys() - _FIELDS}
        config = cls(**(dict(config_dict) | kwargs))
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Changes fields, all or none, checked together as at construction.

        Returns:
            What of `kwargs` are no fields.

        Raises:
            ValueError: a value breaks a rule, or a name is a misspelt field.
        """
        others = {name: kwargs.pop(name) for name in kwargs.keys() - _FIELDS}
        for name in others:
            _check_attribute(name)
        if kwargs:
            self.__dict__.update(self._checked(**kwargs).__dict__)
        return others

    def _checked(self, **changes: Any) -> "QVLMConfig":
        """A checked copy with `changes`: a mapping may have been changed in place."""
        return QVLMConfig(**({name: self.__dict__[name] for name in _FIELDS} | changes))

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks a field that has a value already, as `update` does, and refuses misspelt names.

        Other attributes are carried along: Transformers marks configurations of its own methods
        with some.
        """
        if name in _FIELDS and name in self.__dict__:
            self.update(**{name: value})
            return
        if name not in _FIELDS:
            _check_attribute(name)
        super().__setattr__(name, value)

    @property
    def weight_bits(self) -> int:
        """Bits of a weight, from `scheme`."""
        return parse_scheme(self.scheme)[0]

    @property
    def activation_bits(self) -> int:
        """Bits of an input value, from `scheme`."""
        return parse_scheme(self.scheme)[1]

    def settings(self) -> CalibrationSettings:
        """The part that calibration reads.

        Raises:
            ValueError: a value breaks a rule.
        """
        weight_bits, activation_bits = parse_scheme(self.scheme)
        options = {name: getattr(self, name) for name in _OPTIONS}
        settings = CalibrationSettings(
            weight_bits=weight_bits, activation_bits=activation_bits, **options
        )
        if self.dataset is None and not settings.needs_data:
            return replace(settings, recipe="fixed")  # nothing to compare recipes by
        return settings

    def settle_without_data(self) -> None:
        """Switches off every option that needs calibration data.

        Raises:
            ValueError: something was asked for that needs data.
        """
        for name in ("optimize_vision", "precision_budget", "resume_dir", "scratch_dir"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs calibration data: give dataset= too, or "
                    f"leave it out."
                )
        self.update(**SWITCHED_OFF)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that config.json holds: only the fields that belong there.

        Raises:
            ValueError: a mapping was changed in place to what breaks a rule.
        """
        checked = self._checked()
        return {
            name: _plain(getattr(checked, name))
            for name, each in _FIELDS.items()
            if each.metadata["saved"]
        }  # a whitelist: no attribute leaks into config.json

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`: a file must not depend on the defaults of the version that reads it."""
        return self.to_dict()

    def get(self, key: str, default: Any = None) -> Any:
        """A field by name: Transformers treats a quantization configuration as a dict at times."""
        return getattr(self, key, default)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QVLMConfig) and self.to_dict() == other.to_dict()

    __repr__ = QuantizationConfigMixin.__repr__
    __hash__ = None  # type: ignore[assignment]  # mutable, as every quantization config

    def __copy__(self) -> "QVLMConfig":
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, Any]) -> "QVLMConfig":
        other = object.__new__(type(self))
        checked = self._checked()  # now, rather than after hours of calibration
        others = {name: value for name, value in self.__dict__.items() if name not in _FIELDS}
        other.__dict__.update(checked.__dict__, **copy.deepcopy(others, memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"dataset": None, "processor": None, "callbacks": ()}


def _plain(value: Any) -> Any:
    """`value` as JSON has it: new dicts and lists, schemes as their dicts."""
    if isinstance(value, QuantScheme):
        return value.to_dict()
    if isinstance(value, VisionOptimization):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_attribute(name: str) -> None:
    """Refuses a misspelt field, and what is derived from one."""
    if name in ("weight_bits", "activation_bits"):
        raise ValueError(f"{name} comes from the scheme: give scheme, as in scheme='W4A8'.")
    if not name.startswith("_") and (close := get_close_matches(name.lower(), _FIELDS, 1, 0.8)):
        raise ValueError(f"QVLMConfig has no field {name!r}: is it {close[0]!r}?")


_FIELDS = {each.name: each for each in fields(QVLMConfig)}
