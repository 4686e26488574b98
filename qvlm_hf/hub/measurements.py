"""Adds a later measurement to a saved directory: to its report, and from there to its card."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvlm_hf.format.files import write_json
from qvlm_hf.hub.card import write_card
from qvlm_hf.hub.file_list import relist_files
from qvlm_hf.hub.saved import REPORT_NAME, SavedModel

__all__ = ["check_recordable", "record_measurement"]


def check_recordable(directory: str) -> Path:
    """Checks, before a long measurement, that its result can be kept in the directory.

    Raises:
        ValueError: it is no local directory of a model quantized by qvlm_hf, or may not be written.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(
            f"--record: {directory} is no local directory: download the model first, or leave "
            f"--record out."
        )
    _ = SavedModel(folder).report
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"--record: {directory} may not be written: copy it, or leave --record out."
        )
    return folder


def record_measurement(
    folder: Path,
    *,
    evaluation: dict[str, Any] | None = None,
    benchmark: dict[str, Any] | None = None,
) -> None:
    """Puts measurements into the report, in place of earlier ones, and writes the card anew.

    Raises:
        ValueError: as `SavedModel` and `write_card`.
    """
    report = SavedModel(folder).report
    report = replace(
        report, evaluation=evaluation or report.evaluation, benchmark=benchmark or report.benchmark
    )
    write_json(folder / REPORT_NAME, report.to_dict())
    relist_files(folder, (REPORT_NAME,))
    write_card(folder)
