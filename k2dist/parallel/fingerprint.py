"""What ranks must have in common to compute together, and what only their bits depend on. Pure.

    must be equal      k2dist, model, dtype, tp                     else they do not even speak alike
    should be equal    kernels, kernel_versions, torch, device      else a request's bits depend on its lane

The second kind is refused too, unless the config says `ranks.allow_mix`: recovery, and a lane chosen by load,
then stay correct and no longer give the same bits (`engine/BITS.md`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from k2dist.messages import Message

MUST_EQUAL = ("k2dist", "model", "dtype", "tp")


class Fingerprint(Message, frozen=True, kw_only=True):
    """One rank's. Every field is compared by its text alone."""

    k2dist: str  # version, and a digest of its sources
    model: str  # digest of what describes the checkpoint: config, index, vocabulary
    dtype: str
    tp: int
    kernels: str  # name of the set
    kernel_versions: tuple[str, ...]  # as the set states them: its build, its instructions or architecture
    torch: str
    device: str  # what computes: vector width of the CPU, or name and architecture of the GPU


class Introduction(Message, frozen=True, kw_only=True):
    """A fingerprint and whose it is. `node`: address at which the rank listens."""

    world_rank: int
    node: str
    fingerprint: Fingerprint


class Difference(Message, frozen=True, kw_only=True):
    """A field in which two ranks differ, the first rank of the world and the first that is not like it."""

    field: str
    ranks: tuple[int, int]
    nodes: tuple[str, str]
    values: tuple[str, str]

    @property
    def is_forbidden(self) -> bool:
        """Whatever the config allows."""
        return self.field in MUST_EQUAL

    def __str__(self) -> str:
        (a, b), (node_a, node_b), (value_a, value_b) = self.ranks, self.nodes, self.values
        return f"{self.field} is {value_a} on rank {a} ({node_a}) and {value_b} on rank {b} ({node_b})"


def differences(introductions: Sequence[Introduction]) -> tuple[Difference, ...]:
    """At most one for each field, fields in their order; equal on every rank that is given the same."""
    return tuple(_differences(introductions))


def _differences(introductions: Sequence[Introduction]) -> Iterator[Difference]:
    first, *others = introductions
    for field in Fingerprint.__struct_fields__:
        wanted = _text(first, field)
        for other in others:
            found = _text(other, field)
            if found != wanted:
                yield Difference(
                    field=field,
                    ranks=(first.world_rank, other.world_rank),
                    nodes=(first.node, other.node),
                    values=(wanted, found),
                )
                break


def _text(introduction: Introduction, field: str) -> str:
    value = getattr(introduction.fingerprint, field)
    return " ".join(value) if isinstance(value, tuple) else str(value)
