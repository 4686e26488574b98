"""What every test starts from: no network, a fixed seed, two threads."""

import os

# Before anything imports torch: threads that wait by spinning take the cores from whatever else
# runs there, another test for one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before anything imports huggingface_hub: it reads both once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from hypothesis import settings

# Derandomised: a failure on one machine is a failure on all. The database would only write files
# into the repository.
settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("tests")
torch.set_num_threads(2)  # sums depend on how they are split


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
