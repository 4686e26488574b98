"""`load_samples` reads, checks and chooses; `hold_out` splits off samples to check with."""

import os
from collections.abc import Sequence
from pathlib import Path

from qvlm_hf.calibration.samples.formats import convert_rows
from qvlm_hf.calibration.samples.sample import Sample
from qvlm_hf.calibration.samples.sources import read_rows, shuffled, source_name
from qvlm_hf.calibration.values import whole_number

__all__ = ["dataset_name", "hold_out", "load_samples"]


def load_samples(dataset: object, *, num_samples: int | None = None, seed: int = 0) -> list[Sample]:
    """Reads, checks and chooses samples.

    Args:
        dataset: a .jsonl or .json file; a ScienceQA folder, "folder" or "folder:split" (default
            split "train"); a Hub id, "name/name" or "name/name:split" (needs the `datasets`
            package); a list, a `datasets.Dataset` or another iterable of dicts or `Sample`s.
            Pictures in files are relative to the file, others to the working directory.
        num_samples: how many to take; all if None or if there are fewer. From a source with a
            length a seeded random choice, in source order, and a smaller choice is part of a larger
            one; from a one-pass iterable the first. A choice of a file or list has every kind of
            content that the source has (`_content`); of another source with a length it has a
            picture if there is one.
        seed: of the choice.

    Returns:
        The chosen samples in source order. Files and lists are checked whole; pictures, and the
        rows of a `datasets.Dataset` (each costs a decode), only as far as they are chosen.

    Raises:
        ValueError: one line: what is wrong, where (file, line, key) and how to mend it.
    """
    if num_samples is not None:
        num_samples = whole_number("num_samples", num_samples, 1, ": leave it out to take all")
    seed = whole_number("seed", seed, 0)
    rows = read_rows(dataset, num_samples, seed)
    if not rows:
        raise ValueError(f"{source_name(dataset)} has no samples; at least one is needed")
    samples = convert_rows(rows, source_name(dataset))
    chosen = [samples[index] for index in _choose(samples, num_samples, seed)]
    for sample in chosen:
        sample.images()  # one that is cut short shows only when it is decoded
    return chosen


def dataset_name(dataset: object) -> str:
    """How a record names a source: a file or folder without its path, a Hub id, or a class."""
    if not isinstance(dataset, (str, os.PathLike)):
        return f"{type(dataset).__name__} in memory"
    path = Path(os.path.expanduser(dataset))
    if path.exists():
        return path.resolve().name
    head, _, split = str(dataset).rpartition(":")
    folder = Path(os.path.expanduser(head))
    return f"{folder.resolve().name}:{split}" if head and folder.is_dir() else str(dataset)


def hold_out(
    samples: Sequence[Sample], num_samples: int, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into those to calibrate on, with every kind of content, and the rest."""
    chosen = set(_choose(samples, num_samples, seed))
    first: list[Sample] = []
    rest: list[Sample] = []
    for index, sample in enumerate(samples):
        (first if index in chosen else rest).append(sample)
    return first, rest


def _choose(samples: Sequence[Sample], num_samples: int | None, seed: int) -> list[int]:
    """A seeded choice of indices: the first of each kind of content, then whatever comes first.

    Where the first `num_samples` of that order have every kind anyway, they are the choice. Where
    there is room for few kinds only, samples with pictures go first: without one the vision encoder
    cannot be calibrated.
    """
    if num_samples is None or num_samples >= len(samples):
        return list(range(len(samples)))
    order, seen, first = shuffled(len(samples), seed), set[str](), list[int]()
    for index in order:
        kinds = _content(samples[index])
        if not kinds <= seen:
            seen |= kinds
            first.append(index)
    first.sort(key=lambda index: "pictures" not in _content(samples[index]))
    return sorted([*first, *(index for index in order if index not in first)][:num_samples])


def _content(sample: Sample) -> set[str]:
    """The kinds of content in a sample: the ways in which the model reads it differently."""
    pictures = len(sample.pictures())
    turns = sum(message["role"] == "user" for message in sample.messages)
    kinds = {
        "pictures": pictures > 0,
        "text only": pictures == 0,
        "several pictures": pictures > 1,
        "several turns": turns > 1,
        "answers": sample.answer is not None,
    }
    return {kind for kind, there in kinds.items() if there}
