"""The comparison with other quantizers: what they get is the same model, and failures are rows."""

import sys
from dataclasses import replace

import pytest
import torch
from bench.peer_accuracy import bits, padded, run, table
from bench.peer_workers import METHODS, answers, linears, one_by_one, quantized, texts
from tiny_models import tiny_llava

from qvlm_hf import QVLMConfig, quantize_model


def test_padding_adds_zero_channels_and_computes_the_same():
    model = tiny_llava()
    wider = padded(model, 24)
    ids = [{"input_ids": torch.arange(5, 12)[None]}]
    torch.testing.assert_close(texts(wider, ids), texts(model, ids))
    sizes = {
        linear.in_features for name, linear in linears(wider) if "down" in name or "fc2" in name
    }
    assert all(size % 24 == 0 for size in sizes)
    config = model.config.get_text_config()
    assert config.intermediate_size not in sizes  # the original is as it was


def test_answers_are_the_labelled_tokens():
    model = tiny_llava()
    ids = torch.arange(5, 17).view(2, 6)
    labels = torch.full_like(ids, -100)
    labels[0, 4:], labels[1, 2] = ids[0, 4:], ids[1, 2]
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = answers(model, [batch])
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(found, torch.stack([logits[0, 3], logits[0, 4], logits[1, 1]]))


def test_rows_with_a_picture_stand_alone():
    ids = torch.tensor([[7, 3, 4, 5], [1, 2, 3, 0], [2, 7, 3, 0]])  # 7 is a picture
    batch = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": ids,
        "pixel_values": torch.arange(2.0).view(2, 1, 1, 1),
    }
    first, second = one_by_one([batch, {"input_ids": ids[1:2]}], image_token=7)
    assert first["input_ids"].tolist() == [[7, 3, 4, 5]]
    assert second["input_ids"].tolist() == [[2, 7, 3]]
    assert [one["pixel_values"].item() for one in (first, second)] == [0, 1]
    assert {*first} == {"input_ids", "attention_mask", "pixel_values"}


def test_modules_are_counted_by_type():
    full, model = tiny_llava(), tiny_llava()
    assert quantized(full, model, by_type=False).startswith("vision 0/")
    config = QVLMConfig(scheme="W4A16", quantize_vision=False, quantize_projector=False)
    quantize_model(model, config)
    counts = dict(part.split() for part in quantized(full, model, by_type=True).split(", "))
    assert counts["vision"].startswith("0/")
    assert len(set(counts["language"].split("/"))) == 1  # all of them


def test_bits_count_scales_and_zero_points():
    method = METHODS["hqq W4A16 HQQ, zero points"]
    assert bits(method, 64) == 4 + 32 / 64
    assert bits(replace(method, group=128), 64) == 4 + 32 / 128
    assert bits(replace(method, group=0), 64) == 4


def test_a_command_that_fails_says_its_last_words():
    assert [line.strip() for line in run([sys.executable, "-c", "print(7)"], 60)] == ["7"]
    with pytest.raises(RuntimeError, match="ValueError: no"):
        list(run([sys.executable, "-c", "raise ValueError('no')"], 60))
    with pytest.raises(RuntimeError, match="took over 1 s"):
        list(run([sys.executable, "-c", "import time; time.sleep(60)"], 1))


def test_the_table_has_means_over_seeds_and_failures():
    def row(method, seed, kl):
        part = {"kl": kl, "agreement": 0.5}
        scheme = METHODS[method].scheme
        row = {"method": method, "scheme": scheme, "seed": seed, "bits": 4.25, "seconds": 2}
        return {**row, "modules": "language 1/1", "same": 0.0, "answers": part, "text": part}

    ours, other = "qvlm_hf W4A16 auto", "bitsandbytes W4A16 nf4"
    failed = {"method": other, "scheme": "W4A16", "seed": 0, "error": "ValueError: no"}
    lines = table([failed, row(ours, 0, 0.1), row(ours, 1, 0.3)]).splitlines()
    assert "0.2000 (0.1000, 0.3000)" in lines[2]
    assert lines[3] == "| W4A16 | bitsandbytes: nf4 | failed: ValueError: no |"
