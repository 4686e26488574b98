"""What revision ad7f53b saved loads with every bit, packs to the same files and answers the same.

tests/golden/saved was written by that revision on Transformers 5.23.0: four schemes of `tiny_llava(seed=3)`.
Beside each model lie its logits and a digest of every tensor of its `dequantize()`.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from tiny_models import tiny_messages, tiny_processor
from transformers import AutoModelForImageTextToText

from qvlm_hf.calibration.samples import collate, load_samples

SAVED = Path(__file__).parent.parent / "golden" / "saved"


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().float().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", sorted(path.name for path in SAVED.iterdir()))
def test_files_of_an_earlier_revision_load_with_every_bit(name, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(SAVED / name, dtype=torch.float32)
    batch = collate(load_samples(tiny_messages(4, seed=7)), tiny_processor())
    with torch.no_grad():
        logits = model(**batch.inputs).logits[:, 20:24]
    expected = load((SAVED / name / "logits.safetensors.expected").read_bytes())["logits"]
    # a processor that sums in another order may round an input to the next level
    assert (logits - expected).norm() < 0.02 * expected.norm()

    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (SAVED / name, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    kept, now = (
        json.loads((folder / "config.json").read_text()) for folder in (SAVED / name, tmp_path)
    )
    assert now["quantization_config"].items() >= kept["quantization_config"].items()

    found = {key: digest(tensor) for key, tensor in model.dequantize().state_dict().items()}
    assert found == json.loads((SAVED / name / "dequantized.json").read_text())
