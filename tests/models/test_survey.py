"""The families of Transformers by structure, all of them: what docs/models.md says of each."""

import json
from pathlib import Path

import pytest
from models.survey import FAMILIES, summary, survey

pytestmark = pytest.mark.slow

COMMITTED = json.loads((Path(__file__).parent / "survey.json").read_text())


@pytest.fixture(scope="module")
def found():
    return summary({family: survey(family) for family in FAMILIES})


def test_at_least_70_work(found):
    assert len(found["works"]) >= 70


def test_the_page_says_what_came_of_each(found):
    """A difference is put there by `python tests/models/survey.py --json tests/models/survey.json`,
    and `python tests/write_docs.py`.
    """
    assert found == COMMITTED
