"""`accelerate launch -m qvlm_hf quantize ...`: several processes make one result.

They split the calibration batches (calibration/process/ranks.py). The first one alone saves,
publishes and speaks; an error of any of them is its error.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from qvlm_hf.calibration.process import ranks

__all__ = ["joined"]

_PATIENCE = timedelta(hours=6)  # with a process that is busy; of one that ended the launcher tells


@contextmanager
def joined(*, debug: bool) -> Iterator[dict[str, Any]]:
    """Joins the processes of a launcher, if there is one, until all of them leave the context.

    Yields:
        Options for `from_pretrained`: each process has a GPU of its own, where there are any.

    Raises:
        SystemExit: in every process but the first, where any of them failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield {}
        return
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    options = {} if state.device.type == "cpu" else {"device_map": {"": state.device}}
    try:
        with ranks.sharing_errors():
            yield options
    except Exception:
        if ranks.is_main() or debug:
            raise
        sys.exit(1)
