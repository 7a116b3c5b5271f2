"""What an operation must move and compute at least: the denominator of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes read and written once each, and floating-point operations (a multiply-add counts two)."""

    num_bytes: int
    num_flops: int
