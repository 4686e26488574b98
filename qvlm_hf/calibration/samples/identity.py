"""Which samples are the same: a hash of all of them, and their order by picture."""

import hashlib
from collections.abc import Sequence

from qvlm_hf.calibration.samples.pictures import image_bytes
from qvlm_hf.calibration.samples.sample import Sample

__all__ = ["by_picture", "fingerprint"]


def by_picture(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples, those with the same pictures side by side: neighbouring batches then know little of each other."""
    places: dict[str, int] = {}
    return sorted(samples, key=lambda sample: places.setdefault(_picture_hash(sample), len(places)))


def _picture_hash(sample: Sample) -> str:
    digest = hashlib.sha256()
    for key, value in sample.pictures():
        digest.update(image_bytes(key, value, sample.origin))
    return digest.hexdigest()


def fingerprint(samples: Sequence[Sample]) -> str:
    """Hashes roles, texts and pictures (file bytes, or pixels of those in memory), in order, with SHA-256; origins don't count."""
    digest = hashlib.sha256()
    for sample in samples:
        pictures = iter(sample.pictures())
        digest.update(f"sample {len(sample.messages)}\0".encode())
        for message in sample.messages:
            digest.update(f"{message['role']} {len(message['content'])}\0".encode())
            for part in message["content"]:
                payload = (
                    part["text"].encode()
                    if part["type"] == "text"
                    else image_bytes(*next(pictures), sample.origin)
                )
                # The length in front keeps "ab" + "c" and "a" + "bc" apart.
                digest.update(f"{part['type']} {len(payload)}\0".encode() + payload)
    return digest.hexdigest()
