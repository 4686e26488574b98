"""Rows of every sample format, files of them, and the messages that `load_samples` answers with."""

import json

import pytest
from PIL import Image

from qvlm_hf.calibration.samples import load_samples

__all__ = [
    "CHAT",
    "GOOD",
    "LLAVA",
    "RED",
    "TEXT_PART",
    "chat",
    "notes",
    "refusal",
    "sample_folder",
    "user",
    "user_parts",
    "write_lines",
]

RED = Image.new("RGB", (8, 6), "red")
GOOD = {"image": "a.png", "question": "what ?", "answer": "red"}
TEXT_PART = {"type": "text", "text": "a"}
CHAT = [
    {
        "role": "user",
        "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what colour ?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]
LLAVA = [{"from": "human", "value": "<image>\nwhat colour ?"}, {"from": "gpt", "value": "red"}]


def chat(*messages):
    return {"messages": list(messages)}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def user_parts(sample):
    return [(part["type"], part.get("text")) for part in sample.messages[0]["content"]]


@pytest.fixture
def sample_folder(tmp_path):
    RED.save(tmp_path / "a.png")
    Image.new("RGB", (8, 6), "blue").save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    return tmp_path


def write_lines(folder, *records, name="data.jsonl"):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder / name


def refusal(source, **options):
    """The message with which load_samples refuses; always a single line."""
    with pytest.raises(ValueError, match=r"\A.+\Z") as caught:  # without DOTALL: one line
        load_samples(source, **options)
    return str(caught.value)


def notes(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("qvlm_hf")]
