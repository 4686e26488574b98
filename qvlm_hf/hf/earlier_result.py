"""What a save may replace: what an earlier result of ours listed as its own, and nothing else."""

from pathlib import Path

from qvlm_hf.hub.file_list import written_entries

__all__ = ["OLD", "PARTIAL", "check_replaceable"]

# Folders of a save in progress begin so: what is written, and what it replaces.
PARTIAL, OLD = ".qvlm-partial-", ".qvlm-old-"


def check_replaceable(folder: Path, shown: object) -> None:
    """Checks that a directory holds an earlier result of ours, as we wrote it, and nothing besides.

    Raises:
        ValueError: it holds no such result, or something else too.
        OSError: it cannot be read.
    """
    entries = sorted(folder.iterdir())
    if left := [entry.name for entry in entries if entry.name.startswith((PARTIAL, OLD))]:
        remedy = "move what you need out of it and delete it"
        if len({name.startswith(OLD) for name in left}) > 1:  # the move itself was cut short
            remedy = (
                f"if none runs, both results are whole: move up what {OLD}... holds for the "
                f"earlier one, or what {PARTIAL}... holds for the new one, over files of the same "
                f"name, and delete both folders"
            )
        raise ValueError(
            f"{shown}: holds {' and '.join(left)} of a save that was interrupted or still runs: "
            f"{remedy}, or choose another directory."
        )
    ours = written_entries(folder)
    if ours is None:
        raise ValueError(
            f"{shown}: holds no earlier result of qvlm_hf that lists its files, so nothing there "
            f"is "
            "replaced: delete it yourself, or choose another directory."
        )
    if foreign := [entry.name for entry in entries if entry not in ours]:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ValueError(
            f"{shown}: holds {foreign[0]}{more}, which no earlier result of qvlm_hf wrote like "
            f"that: "
            "move that away, or choose another directory."
        )
