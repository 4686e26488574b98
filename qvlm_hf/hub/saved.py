"""A saved model as a directory on disk: the one place that reads it, and no weight of it."""

import copy
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn

from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.errors import first_line
from qvlm_hf.format.files import INDEX_NAME, SINGLE_NAME, TensorHeader, tensor_headers, weight_files
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.experts import experts_split
from qvlm_hf.models.find_parts import component_finder
from qvlm_hf.models.graph import canonical_name
from qvlm_hf.nn.footprint import Footprint, footprint

__all__ = [
    "REPORT_NAME",
    "LinearModule",
    "SavedModel",
    "as_damaged_report",
    "empty_model",
    "read_report",
]

REPORT_NAME = "qvlm_report.json"
_NO_SETTINGS = ("quant_method", "format_version", "scheme", "provenance", "modules")


@dataclass(frozen=True, kw_only=True)
class LinearModule:
    """One linear module; without a scheme it is in full precision."""

    name: str
    component: str
    weights: int
    scheme: QuantScheme | None


class SavedModel:
    """A saved model, quantized or not. Each part is read when it is first asked for.

    Every attribute raises ValueError, in one line with the remedy, where its file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """config.json."""
        remedy = "name the directory of a saved model"
        try:
            found = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{self.folder}: holds no config.json: {remedy}.") from error
        except ValueError as error:
            raise ValueError(
                f"{self.folder}: its config.json is no JSON ({first_line(error)}): {remedy}."
            ) from error
        return found if isinstance(found, dict) else {}

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """`quantization_config` of config.json; only a model quantized by qvlm_hf has it."""
        found = self.config_json.get("quantization_config")
        if not isinstance(found, dict) or found.get("quant_method") != "qvlm":
            raise ValueError(
                f"{self.folder}: is not quantized by qvlm_hf: name a directory that qvlm quantize "
                f"wrote."
            )
        return found

    @cached_property
    def report(self) -> CalibrationReport:
        """qvlm_report.json, or what config.json knows of it where the file is missing."""
        saved = self.quantization
        if (file := self.folder / REPORT_NAME).is_file():
            return read_report(file)
        return CalibrationReport(
            settings={name: value for name, value in saved.items() if name not in _NO_SETTINGS},
            provenance=saved["provenance"],
            modules={name: QuantScheme.from_dict(one) for name, one in saved["modules"].items()},
        )

    @cached_property
    def config(self) -> Any:
        """Transformers' configuration, without `quantization_config`."""
        from transformers import AutoConfig  # not at the top: it takes a second

        config = AutoConfig.from_pretrained(self.folder)
        vars(config).pop("quantization_config", None)
        return config

    @cached_property
    def model(self) -> Any:
        """The full-precision model on the meta device: modules and shapes."""
        return empty_model(self.config)

    @cached_property
    def files(self) -> list[Path]:
        """The files that hold weights."""
        return weight_files(self.folder)

    @cached_property
    def headers(self) -> list[TensorHeader]:
        """Every tensor in them."""
        return [header for file in self.files for header in tensor_headers(file)]

    @property
    def dtype(self) -> torch.dtype:
        """Of everything that is not quantized."""
        return self.config.dtype or torch.float32

    def sizes(self, dtype: torch.dtype) -> Footprint:
        """Bytes of every component in `dtype`, and in the files."""
        component_of, stored = component_finder(self.model), Counter[str]()
        for header in self.headers:
            stored[component_of(header.key)] += header.nbytes
        rows = footprint(self.model, {}, dtype=dtype).rows
        return Footprint(
            rows=tuple(replace(row, quantized_bytes=stored[row.component]) for row in rows)
        )

    @cached_property
    def linear_modules(self) -> list[LinearModule]:
        """Every linear module, in model order."""
        schemes, component_of = self.report.modules, component_finder(self.model)
        with experts_split(self.model):
            named = list(self.model.named_modules())
        return [
            LinearModule(
                name=(name := canonical_name(path)),
                component=component_of(name),
                weights=module.weight.numel(),
                scheme=schemes.get(name),
            )
            for path, module in named
            if isinstance(module, nn.Linear)
        ]

    def check_weights(self) -> None:
        """Checks that weights are there, and that packed ones have their quantization_config.

        Without it nothing tells Transformers to ask this package. A model in another format is
        Transformers' business.

        Raises:
            ValueError: as said, or the files are damaged.
        """
        saved = self.config_json.get("quantization_config")
        ours = isinstance(saved, dict) and saved.get("quant_method") == "qvlm"
        if not ours and not any(
            (self.folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)
        ):
            return
        for header in self.headers if self.files and not saved else ():
            if header.key.endswith(".weight_scale"):
                raise ValueError(
                    f"{self.folder}: its config.json has no quantization_config, but {header.key} "
                    f"is of a quantized model: download or quantize the model again."
                )


def read_report(file: Path) -> CalibrationReport:
    """Reads a qvlm_report.json.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    with as_damaged_report(ValueError):  # of JSON, UTF-8, schemes
        return CalibrationReport.from_dict(json.loads(file.read_text(encoding="utf-8")))


@contextmanager
def as_damaged_report(*others: type[Exception]) -> Iterator[None]:
    """Inside, what a damaged qvlm_report.json leads to becomes one line with the remedy.

    `others`: kinds of errors that can come from nothing else there.
    """
    kinds: tuple[type[Exception], ...]
    kinds = (TypeError, AttributeError, LookupError, OverflowError, TemplateError, *others)
    try:
        yield
    except kinds as error:
        no_json = isinstance(error, json.JSONDecodeError)
        raise ValueError(
            f"{REPORT_NAME}: {'is no JSON' if no_json else 'cannot be used'} "
            f"({first_line(error)}): delete it, or quantize the model again."
        ) from error


def empty_model(config: Any) -> Any:
    """The full-precision model of a configuration on the meta device: shapes, no memory.

    Raises:
        ValueError: it cannot be built, for example because a package is missing.
    """
    from transformers import AutoModelForImageTextToText  # not at the top: it takes a second

    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # of a family's own code
        raise ValueError(
            f"config.json: no {config.model_type!r} model can be built from it "
            f"({first_line(error)}): mend the file, or install what is missing."
        ) from error
