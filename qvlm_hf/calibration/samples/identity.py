"""Which samples are the same: a hash of all of them, and their order by picture."""

import hashlib
from collections.abc import Sequence

from qvlm_hf.calibration.samples.errors import place
from qvlm_hf.calibration.samples.pictures import image_bytes
from qvlm_hf.calibration.samples.sample import Sample

__all__ = ["by_picture", "fingerprint"]


def by_picture(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples, those with the same pictures side by side, and those without any last.

    Neighbouring batches then know little of each other, and those that do not reach the vision
    encoder come behind those that do.
    """
    places: dict[str, int] = {}

    def place(sample: Sample) -> tuple[bool, int]:
        return not sample.pictures(), places.setdefault(_picture_hash(sample), len(places))

    return sorted(samples, key=place)


def _picture_hash(sample: Sample) -> str:
    digest = hashlib.sha256()
    for key, value in sample.pictures():
        digest.update(image_bytes(value, place(sample.origin, key)))
    return digest.hexdigest()


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 of roles, texts and pictures (file bytes, or pixels in memory), in order."""
    digest = hashlib.sha256()
    for sample in samples:
        pictures = iter(sample.pictures())
        digest.update(f"sample {len(sample.messages)}\0".encode())
        for message in sample.messages:
            digest.update(f"{message['role']} {len(message['content'])}\0".encode())
            for part in message["content"]:
                if part["type"] == "text":
                    payload = part["text"].encode()
                else:
                    key, value = next(pictures)
                    payload = image_bytes(value, place(sample.origin, key))
                # The length in front keeps "ab" + "c" and "a" + "bc" apart.
                digest.update(f"{part['type']} {len(payload)}\0".encode() + payload)
    return digest.hexdigest()
