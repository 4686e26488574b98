"""The columns under which accuracy on ScienceQA is published (Lu et al., NeurIPS 2022, table 4)."""

from collections.abc import Mapping
from typing import Any

__all__ = ["COLUMNS", "published_columns"]

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


def published_columns(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that a question counts in: subject, context, grade; () for another data set.

    A question with a hint and a picture counts under TXT and IMG. `record` has no "image" where
    there is none.
    """
    subject, grade = _SUBJECTS.get(str(record.get("subject"))), str(record.get("grade", ""))
    year = grade.removeprefix("grade")
    if subject is None or not year.isdecimal():
        return ()
    context = ["TXT"] if record.get("hint") else []
    context += ["IMG"] if "image" in record else []
    return (subject, *(context or ["NO"]), "G1-6" if int(year) <= 6 else "G7-12")
