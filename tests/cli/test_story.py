"""What `qvlm quantize` tells at its end: tables whose columns stand below each other."""

import json
from types import SimpleNamespace

from qvlm_hf.calibration.record.report import CalibrationReport, RecipeTrial
from qvlm_hf.cli import story


def test_the_order_is_that_of_a_report_from_disk():
    fields = {"rotation": None, "activation_granularity": "channel"}
    report = CalibrationReport(
        settings={},
        provenance={},
        modules={},
        recipes=(RecipeTrial(fields=fields, answer_kl=0.5, text_kl=0.25),),
        seconds={"search": 2.0, "recipes": 9.25, "check": 1.0},
    )
    stored = json.loads(json.dumps(report.to_dict(), sort_keys=True))
    lines = list(story.story(report))
    assert lines == list(story.story(CalibrationReport.from_dict(stored)))
    assert lines[0].startswith("recipes, the one taken first (geometric means)")
    assert lines[1].startswith("  activation_granularity=channel, rotation=None ")
    assert lines[2] == "seconds: recipes 9.2, search 2.0, check 1.0"


def test_recipes_of_any_length_stand_in_columns():
    fields = {"rotation": "hadamard", "activation_granularity": "dynamic_group"}
    trials = [
        RecipeTrial(fields=each, answer_kl=0.5, text_kl=0.25)
        for each in (fields | {"equalization": False, "written_text": True}, fields)
    ]
    heading, *lines = story._recipes(SimpleNamespace(recipes=tuple(trials)))
    assert len({len(line) for line in (heading, *lines)}) == 1
    assert all(line.endswith("   0.5000   0.2500") for line in lines)
    assert not list(story._recipes(SimpleNamespace(recipes=())))
