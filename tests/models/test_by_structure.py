"""What one run of a model tells about it, against the rows of the table and against made-up models."""

import pytest
import torch
from tiny_models import tiny_llava
from torch import nn

from qvlm_hf.models.by_structure import StructureError, read_structure
from qvlm_hf.models.graph import resolve


def test_llava_reads_as_its_row_says():
    model = tiny_llava()
    assert read_structure(model).segments == resolve(model)


def test_llava_on_the_meta_device_reads_the_same():
    with torch.device("meta"):
        model = tiny_llava().to("meta")
    assert read_structure(model).segments == resolve(model)
