"""Several processes calibrate one model together, each on its own batches (docs/decisions/0028).

Every process has the whole model and all samples. It runs its own batches, and what they add up to
is exchanged, so that all processes decide alike and end with the same quantized model. Sums go
through the processes in the order of their numbers: the same run gives the same bytes again.

Names are those of `torch.distributed`; here results are returned. In one process, without
`torch.distributed`, everything returns what it is given.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "SCREENED",
    "OtherProcessError",
    "all_gather",
    "all_reduce",
    "all_reduce_numbers",
    "broadcast",
    "broadcast_object",
    "check_alike",
    "is_main",
    "no_sync",
    "offsets",
    "rank",
    "shard",
    "shard_batches",
    "sharing_errors",
    "world_size",
]

SCREENED = 4  # every so many pairs of batches one screens candidates (search/joint_search.py)
_PIECE = 2**22  # values that are exchanged at a time: every process holds as many of each other

_Number = TypeVar("_Number", bound=float)

_REDUCE: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "sum": lambda parts: reduce(torch.add, [part.double() for part in parts]),
    "max": lambda parts: torch.stack(parts).amax(0),
    "min": lambda parts: torch.stack(parts).amin(0),
}

_alone = _shares_errors = False


class OtherProcessError(ValueError):
    """Another process failed; the message is its own."""


def world_size() -> int:
    """Processes that calibrate together; 1 without `torch.distributed`, and inside `no_sync`."""
    return dist.get_world_size() if _joined() and not _alone else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes files and tells progress; `no_sync` does not change that."""
    return not _joined() or dist.get_rank() == 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def no_sync() -> Iterator[None]:
    """Inside, this process works alone and exchanges nothing."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def shard_batches(pictured: Sequence[bool], remedy: str = "") -> list[int]:
    """The places of this process's batches, rising.

    Two neighbours stay together: even batches give ranges, and the odd ones judge them. So what is
    even or odd here is so among all batches. Pairs that screen candidates are dealt first.

    Args:
        pictured: of every batch, whether it has a picture. Those that have come first.
        remedy: for the message.

    Raises:
        ValueError: there are not two batches with pictures (or two, if none has) for each process.
    """
    places = list(range(len(pictured)))
    if world_size() == 1:
        return places
    pairs = [places[start : start + 2] for start in places[::2]]
    with_pictures = any(pictured)
    full = [len(pair) == 2 and pictured[pair[1]] >= with_pictures for pair in pairs]
    if sum(full) < world_size():
        what = "batches with pictures" if with_pictures else "batches"
        raise ValueError(
            f"{world_size()} processes need {2 * world_size()} {what}, and there are "
            f"{sum(pictured) if with_pictures else len(pictured)}: start fewer processes{remedy}."
        )
    order = sorted(range(len(pairs)), key=lambda pair: (not full[pair], pair % SCREENED > 0, pair))
    return [place for pair in sorted(order[rank() :: world_size()]) for place in pairs[pair]]


def shard(rows: int) -> slice:
    """The rows of this process, of so many; `torch.cat(all_gather(...))` puts them together."""
    start, stop = (rows * place // world_size() for place in (rank(), rank() + 1))
    return slice(start, stop)


def all_reduce(values: Tensor, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """The sum over processes, taken in float64, or the extreme, in the dtype of `values`."""
    return _reduced(values, _REDUCE[op])


def all_reduce_numbers(*values: _Number) -> tuple[_Number, ...]:
    """The sum over processes of every number; integers, below 2^53, stay integers."""
    if world_size() == 1:
        return values
    sums = all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()
    return tuple(type(value)(found) for value, found in zip(values, sums, strict=True))


def offsets(places: Sequence[int], counts: Sequence[int]) -> list[int]:
    """What the batches in front of each own one count together, those of all processes."""
    pairs = torch.tensor([places, counts], dtype=torch.int64)
    own = dict.fromkeys(places, 0)
    seen = 0
    for place, each in sorted(torch.cat(all_gather(pairs), dim=1).T.tolist()):
        if place in own:
            own[place] = seen
        seen += each
    return list(own.values())


def broadcast(values: Tensor) -> Tensor:
    """The values of the first process, of one shape in every process."""
    return _reduced(values, lambda parts: parts[0])


def broadcast_object(value: Any) -> Any:
    """What the first process gives, as JSON gives it back."""
    return json.loads(bytes(all_gather(_bytes(json.dumps(value)))[0].tolist()))


def check_alike(text: str, what: str) -> None:
    """Raises ValueError where the processes do not give the same text, which stands for `what`."""
    if broadcast_object(text) != text:
        raise ValueError(
            f"process {rank()} has other {what} than the first one: give every process the same."
        )


def all_gather(values: Tensor) -> list[Tensor]:
    """The tensors of all processes, in the order of their numbers.

    They have one dtype and number of dimensions everywhere; shapes may differ.
    """
    if world_size() == 1:
        return [values]
    shapes = [shape.tolist() for shape in _exchange(torch.tensor(values.shape))]
    most = max(torch.Size(shape).numel() for shape in shapes)
    padded = torch.zeros(most, dtype=values.dtype, device=values.device)
    padded[: values.numel()] = values.reshape(-1)
    parts = _exchange(padded) if most else [padded] * world_size()
    return [
        part[: torch.Size(shape).numel()].view(shape).to(values.device)
        for part, shape in zip(parts, shapes, strict=True)
    ]


@contextmanager
def sharing_errors() -> Iterator[None]:
    """Inside, an error of one process ends the others too: none waits for one that has ended.

    Raises:
        OtherProcessError: in the others, with its message.
    """
    global _shares_errors
    if world_size() == 1 or _shares_errors:
        yield
        return
    _shares_errors = True
    try:
        yield
        _exchange(torch.zeros(1))  # who is done waits here for those who may still fail
    except OtherProcessError:
        raise
    except Exception as error:
        told = isinstance(error, ValueError | OSError | RuntimeError) and str(error)
        with suppress(OtherProcessError, RuntimeError):  # another one failed as well, or has ended
            _exchange(_bytes(told or repr(error)), failed=True)
        raise
    finally:
        _shares_errors = False


def _reduced(values: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """What `combine` makes of every process's values, piece by piece."""
    if world_size() == 1 or not values.numel():
        return values
    found = torch.empty(values.numel(), dtype=values.dtype, device=values.device)
    pieces = values.detach().reshape(-1).split(_PIECE)
    for piece, into in zip(pieces, found.split(_PIECE), strict=True):
        into.copy_(combine(_exchange(piece)))
    return found.view(values.shape)


def _exchange(values: Tensor, *, failed: bool = False) -> list[Tensor]:
    """The values of all processes, equally many each; unless one has failed and tells why."""
    device = torch.device("cpu")
    if "gloo" not in dist.get_backend():
        device = torch.device("cuda", torch.cuda.current_device())
    values = values.to(device)
    heads = torch.stack(_all_gather(torch.tensor([failed, values.numel()], device=device))).tolist()
    broken = [place for place, (other_failed, _) in enumerate(heads) if other_failed]
    if not broken:
        if len({size for _, size in heads}) > 1:
            raise RuntimeError(f"the processes took different ways: {heads}. Please report this.")
        return _all_gather(values)
    longest = max(heads[place][1] for place in broken)
    message = torch.zeros(longest, dtype=torch.uint8, device=device)
    if failed:
        message[: values.numel()] = values
    text = bytes(_all_gather(message)[broken[0]].tolist()).rstrip(b"\0").decode(errors="replace")
    raise OtherProcessError(text)


def _all_gather(values: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    try:
        dist.all_gather(parts, values.contiguous())
    except RuntimeError as error:
        raise RuntimeError(
            "another process has ended, or does not answer; its own output says why."
        ) from error
    return parts


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode(errors="replace")), dtype=torch.uint8)
