"""Messages of the library as the command line shows them: its options, and no argument of Python."""

import argparse
import importlib

import pytest

from qvlm_hf.cli.wording import _OPTIONS, in_options


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("num_samples=0 must be an integer of at least 1.", "--num-samples 0 must be an integer of at least 1."),
        ("num_samples is 0; give 1, or None to take all", "--num-samples is 0; give 1, or leave it out to take all"),
        ("precision_budget=1.5 must be 2 to 8, or None.", "--precision-budget 1.5 must be 2 to 8, or left out."),
        ("modules_to_not_convert: 'nose' matches no module", "--modules-to-not-convert: 'nose' matches no module"),
        ("every module is excluded: shorten modules_to_not_convert.", "every module is excluded: shorten --modules-to-not-convert."),
        (
            "W4A8 with group_size=128 and symmetric=False: take group_size=-1",
            "W4A8 with --group-size 128 and no --symmetric: take --group-size -1",
        ),
        (
            "which no consumer reads: quantize with activation_granularity='dynamic_token' and 8 bits",
            "which no consumer reads: quantize with --activation-granularity 'dynamic_token' and 8 bits",
        ),
        ("quantize with rotation=None.", "quantize with --rotation none."),
        ("create_pr=True opens one: leave out revision='dev'.", "--create-pr opens one: leave out --revision 'dev'."),
        (
            "there is no Hub token: run `hf auth login`, set HF_TOKEN or pass token=.",
            "there is no Hub token: run `hf auth login` or set HF_TOKEN.",
        ),
        (
            "dtype=torch.float64 must be torch.float32: pass dtype=torch.bfloat16.",
            "--dtype float64 must be float32: pass --dtype bfloat16.",
        ),
        (
            "strict: use more bits or activation_granularity=None, or calibrate",
            "--strict: use more bits, leave out --activation-granularity, or calibrate",
        ),
        ("lower batch_size, or more samples", "lower --batch-size, or more samples"),
        ("two\n lines", "two lines"),
        ("columns num_samples and batch_size are odd", "columns num_samples and batch_size are odd"),
    ],
)
def test_arguments_become_options(message, expected):
    assert in_options(message) == expected


@pytest.mark.parametrize(
    "message",
    [
        "/data/batch_size/x.jsonl: no such file or folder (looked in /seed=3/group_size)",
        'x.jsonl:3: key "num_samples" is unknown here, and "answer" is missing',
        "config.json: quantization_config lists no modules: the checkpoint is damaged",
        "seed=3/data.jsonl: no such file",
    ],
)
def test_names_of_files_and_keys_stay(message):
    assert in_options(message) == message


def test_options_named_are_options():
    parsers = {name: argparse.ArgumentParser() for name in ("quantize", "publish", "evaluate")}
    for name, parser in parsers.items():
        importlib.import_module(f"qvlm_hf.cli.{name}").add_arguments(parser)
    given = {action.dest for parser in parsers.values() for action in parser._actions if action.option_strings}
    assert set(_OPTIONS) <= given
