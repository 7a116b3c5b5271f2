"""What a decoding step must read at least: each weight that its tokens touch, once, as in the checkpoint.

    all but experts and embedding      once, whatever the step
    embedding                          a row for each token
    experts                            those that at least one token chose

How many experts a step of b rows touches follows from each expert's measured share p of all rows, taken as
independent from row to row: the sum of 1 - (1 - p)^b. At b = 1 that is top_k exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

from k2dist.config import Architecture
from k2dist.parallel.published import published_tensors
from k2dist.planner.held import Kind, expert_bytes, kind_of


def step_bytes(architecture: Architecture, num_rows: int, touched: Sequence[float]) -> float:
    """`touched[m]`: experts of MoE layer m that the step's rows chose."""
    always = embedding = 0
    for tensor in published_tensors(architecture):
        match kind_of(tensor):
            case Kind.EXPERTS:
                pass
            case Kind.EMBEDDING:
                embedding += tensor.num_bytes
            case _:
                always += tensor.num_bytes
    rows = num_rows * embedding / architecture.vocab_size
    return always + rows + sum(touched) * expert_bytes(architecture)


def touched_experts(load_LE: Sequence[Sequence[int]], top_k: int, num_rows: float) -> list[float]:
    """Of each MoE layer, expected in a step of `num_rows`. `load_LE[m][e]`: rows that expert e was given."""
    touched = []
    for load_E in load_LE:
        num_computed = sum(load_E) / top_k
        touched.append(sum(1 - (1 - load / num_computed) ** num_rows for load in load_E))
    return touched
