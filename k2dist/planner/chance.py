"""Chance for simulations, without a clock or a global: equal seeds give equal numbers on every machine."""

from __future__ import annotations

import math
from collections.abc import MutableSequence
from typing import TypeVar

T = TypeVar("T")
_MASK = 2**64 - 1


class Chance:
    """SplitMix64 (Steele, Lea and Flood 2014)."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def integer(self) -> int:
        """Of 64 bits, all alike."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def uniform(self) -> float:
        """In (0, 1)."""
        return ((self.integer() >> 11) + 0.5) / 2**53

    def exponential(self, mean: float) -> float:
        return -mean * math.log(self.uniform())

    def spread(self, mean: int, sigma: float) -> int:
        """A log-normal length of that mean, at least 1. `sigma` 0: the mean itself."""
        if sigma == 0.0:
            return mean
        normal = math.sqrt(-2.0 * math.log(self.uniform())) * math.cos(2.0 * math.pi * self.uniform())
        return max(round(mean * math.exp(sigma * normal - sigma * sigma / 2)), 1)

    def shuffle_(self, values: MutableSequence[T]) -> None:
        for last in range(len(values) - 1, 0, -1):
            other = self.integer() % (last + 1)
            values[last], values[other] = values[other], values[last]
