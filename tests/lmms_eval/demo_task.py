"""What lmms-eval reads from a line of the demo's data.

It imports no qvlm_hf: that a quantized model loads is the work of autoload.
"""

from PIL import Image

__all__ = ["answer", "pictures", "question"]


def pictures(line: dict) -> list[Image.Image]:
    """The pictures; their paths are relative to the working directory."""
    return [
        Image.open(part["path"]).convert("RGB")
        for part in line["messages"][0]["content"]
        if part["type"] == "image"
    ]


def question(line: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The text beside them."""
    return _text(line["messages"][0])


def answer(line: dict) -> str:
    """What a right model says."""
    return _text(line["messages"][1])


def _text(message: dict) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")
