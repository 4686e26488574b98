"""The kernel benchmark measures what it says; its figures are nobody's business here."""

import json

import pytest
import torch

from qvlm_hf.bench.kernels import measure_kernels
from qvlm_hf.bench.machine import Reading
from qvlm_hf.cli import main


def test_every_contender_gets_a_row_and_ratios_belong_together():
    steps = []
    rows = measure_kernels(
        64, 128, [1, 20], rounds=3, cache_bytes=2**16, advance=lambda: steps.append(1)
    )
    assert len(steps) == 2
    few, many = ([row for row in rows if row.tokens == count] for count in (1, 20))
    ours = {f"{scheme}, dynamic_group" for scheme in ("W4A4", "W4A8", "W6A6", "W8A8")}
    assert {row.way for row in few} >= {"torch bfloat16", "torch float32", "qvlm_hf W4A16, none"}
    assert {row.way for row in few} >= {f"qvlm_hf {name}" for name in ours}
    assert {row.way for row in many} - {row.way for row in few} == {"torch int8 (_int_mm), W8A8"}
    for group in (few, many):
        full = [row for row in group if row.way in ("torch bfloat16", "torch float32")]
        base = min(full, key=lambda row: row.milliseconds)
        assert base.speedup == 1
        for row in group:
            assert row.milliseconds > 0
            assert row.speedup == pytest.approx(base.milliseconds / row.milliseconds)
    sizes = {row.way: row.bandwidth * row.milliseconds for row in few}
    assert sizes["torch float32"] == pytest.approx(2 * sizes["torch bfloat16"])


def test_reading_takes_time():
    assert 1e8 < Reading(2**22).bandwidth() < 1e13


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    options = "--out-features 64 --in-features 128 --tokens 1 17 --rounds 2 --json"
    assert main(["bench", "--kernels", *options.split(), str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    assert "against faster" in printed
    assert "qvlm_hf W8A8, dynamic_group" in printed
    result = json.loads((tmp_path / "rows.json").read_text())
    assert result["threads"] == torch.get_num_threads()
    assert {row["tokens"] for row in result["rows"]} == {1, 17}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tokens 1 1", "qvlm: error: --tokens 1 1 names a value twice: name each once.\n"),
        ("--rounds 1", "must be at least 1"),
        ("--tokens 0", "must be at least 1"),
        ("--in-features 100", "must be at least 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options, message, capsys):
    assert main(["bench", "--kernels", *options.split()]) == 1
    assert message in capsys.readouterr().err
