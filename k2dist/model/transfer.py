"""Small tensors to a rank's device and back, without the host waiting where it need not.

Up: through pinned memory, so that the copy is queued like a kernel; from pageable memory the host would wait
for all that is queued already. Back: all that a step has to tell is read at once (`Unread`), since each read
waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x`, of the CPU, on `device`; itself if that is the CPU. The host does not wait."""
    if device.type == "cpu":
        return x
    pinned = x.pin_memory() if device.type == "cuda" else x
    return pinned.to(device, non_blocking=True)


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """Int64 [N]. A list as an index would be copied to the device by torch itself, which waits."""
    return to_device(torch.tensor(values, dtype=torch.int64), device)


@dataclass(frozen=True, slots=True)
class Unread(Generic[T]):
    """What is still on the device (int64, float64 or bool), and what it means once it is on the host.

    `then` is given the tensors on the CPU, bool as int64. It may read further ones itself, and raise.
    """

    tensors: tuple[Tensor, ...]
    then: Callable[[Sequence[Tensor]], T]

    def read(self, settle: Callable[[], None] | None = None) -> T:
        """Wait for the device; `settle` bounds that wait where peers may be late for ever."""
        return self.then(_read(self.tensors, settle))

    def map(self, use: Callable[[T], A]) -> Unread[A]:
        """`use` of what it means."""
        return Unread(self.tensors, lambda values: use(self.then(values)))

    def unless(self, flag: Tensor) -> Unread[T | None]:
        """None, and nothing is looked at, where the bool `flag` is true."""

        def then(values: Sequence[Tensor]) -> T | None:
            return None if bool(values[0].item()) else self.then(values[1:])

        return Unread((flag, *self.tensors), then)


def known(value: T) -> Unread[T]:
    """What needs no reading."""
    return Unread((), lambda _: value)


def both(first: Unread[A], second: Unread[B]) -> Unread[tuple[A, B]]:
    """One read for two; the first is made sense of first."""
    cut = len(first.tensors)
    return Unread(
        (*first.tensors, *second.tensors),
        lambda values: (first.then(values[:cut]), second.then(values[cut:])),
    )


def all_of(unread: Sequence[Unread[T]]) -> Unread[list[T]]:
    """One read for all."""

    def then(values: Sequence[Tensor]) -> list[T]:
        rest = iter(values)
        return [one.then(list(islice(rest, len(one.tensors)))) for one in unread]

    return Unread(tuple(x for one in unread for x in one.tensors), then)


def _read(tensors: Sequence[Tensor], settle: Callable[[], None] | None) -> list[Tensor]:
    """The tensors on the CPU: one copy for all of them."""
    wide = [x.long() if x.dtype == torch.bool else x for x in tensors]
    if not wide or wide[0].device.type == "cpu":
        return wide
    assert all(x.element_size() == 8 for x in wide), "elements of eight bytes"
    flat = torch.cat([x.contiguous().view(-1).view(torch.int64) for x in wide])
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.device.type == "cuda")
    host.copy_(flat, non_blocking=True)
    if settle is not None:
        settle()
    if flat.device.type == "cuda":
        torch.cuda.current_stream(flat.device).synchronize()
    parts = host.split([x.numel() for x in wide])
    return [part.view(x.dtype).view(x.shape) for part, x in zip(parts, wide, strict=True)]
