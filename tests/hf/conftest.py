"""The saved models of these tests."""

import pytest
from saved_models import ask, hub_layout, inputs, kinds, processor, saved, source

__all__ = ["ask", "hub_layout", "inputs", "kinds", "no_weights", "processor", "saved", "source"]


@pytest.fixture
def no_weights(source, tmp_path):
    """A checkpoint whose weights cannot be read: an error about anything else came first."""
    (tmp_path / "model").mkdir()
    for file in source.iterdir():
        content = b"broken" if file.suffix == ".safetensors" else file.read_bytes()
        (tmp_path / "model" / file.name).write_bytes(content)
    return tmp_path / "model"
