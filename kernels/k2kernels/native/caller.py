"""A call into the library: which ISA's functions, and on how many threads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from k2kernels.native.library import Isa


@dataclass(frozen=True, slots=True)
class Caller:
    """`threads`: of each call; None: as many as torch uses at that moment."""

    isa: Isa
    threads: int | None = None

    def __call__(self, name: str, *arguments: object) -> None:
        self.isa.call[name](self.num_threads, *arguments)

    @property
    def num_threads(self) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads
