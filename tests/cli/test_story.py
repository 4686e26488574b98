"""What `qvlm quantize` tells at its end: tables whose columns stand below each other."""

from types import SimpleNamespace

from qvlm_hf.calibration.record.report import RecipeTrial
from qvlm_hf.cli import story


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
