"""What the same bits cost: a step in the order that keeps them, beside the fastest order of each part.

    same bits          products of 16 rows, sums in pairs, reduce_rows, experts' outputs home unreduced
    padded exchange    rows and outputs in frames of a fixed capacity: the same bits too
    library kernels    torch's own products, sums and softmax           (beside the reference's kernels alone)
    all-reduce         gloo's, in place of reduce_rows
    reduced returns    experts' outputs weighted and summed where they are computed
    all of these

Ranks are threads of one process over gloo, with torch's threads shared out among them; all orders take the
same step in turn, and a ratio is the median over the turns. On other transports bytes count for more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from k2dist.bench.bits_world import BitsWorld, Order, Sent, decode_batch, num_places, prompt_batch
from k2dist.comm import CapacityRule
from k2dist.config import Architecture, read_architecture
from k2dist.config.named import KIMI_K2, find_architecture
from k2dist.engine.kernels import select_kernels
from k2dist.messages import Message
from k2dist.model.batch import Batch
from k2dist.parallel import Layout, first_layout
from k2dist.planner.layer_bytes import EvenLayer

NUM_TURNS = 15
CONTEXT = 100
PUBLISHED_ROWS, PUBLISHED_RANKS = 64, 16
FARTHEST = 1e-3  # of a typical row's logits from the same bits' ones, in float32, as a share of the largest

Show = Callable[[int, int], None]

SAME_BITS = Order("same bits")
_CAPACITY_FACTOR = 1.25
_PADDED = Order("padded exchange", capacity_factor=_CAPACITY_FACTOR)
_REDUCTIONS = Order("all-reduce", reductions=True)
_RETURNS = Order("reduced returns", returns=True)
_LIBRARY = (
    SAME_BITS,
    _PADDED,
    Order("library kernels", kernels=True),
    _REDUCTIONS,
    _RETURNS,
    Order("all of these", kernels=True, reductions=True, returns=True),
)
_OTHERS = (SAME_BITS, _PADDED, _REDUCTIONS, _RETURNS, Order("all of these", reductions=True, returns=True))


class OrderCost(Message, frozen=True, kw_only=True):
    """One step in one order. Bytes: of all ranks together, that leave one for another."""

    order: str
    step_ms: float  # median
    same_bits_ratio: float  # time of the same bits' step over this one's: median over the turns
    lane_bytes: int  # reductions; gathers are alike in all orders
    expert_bytes: int  # rows to their experts and outputs home
    off: float  # farthest logit from the same bits', in float32, as a share of the largest; of a typical row


class BitsCost(Message, frozen=True, kw_only=True):
    """One kind of step; `num_rows` of each lane."""

    step: str  # "prompt" or "decode"
    num_rows: int
    orders: tuple[OrderCost, ...]


class FormBytes(Message, frozen=True, kw_only=True):
    """Of one rank to all others in one MoE layer: rows to their experts, and outputs home."""

    form: str  # of the exchange: exact, padded (at a capacity factor of 1.25), pre-reduced
    out_bytes: int
    home_bytes: int


class BitsReport(Message, frozen=True, kw_only=True):
    """The first order of each case is the one that keeps the bits."""

    model: str
    kernels: str
    dtype: str
    lanes: int
    tp: int
    num_ranks: int
    num_turns: int
    cases: tuple[BitsCost, ...]
    published: tuple[FormBytes, ...]  # reckoned: Kimi K2 over `PUBLISHED_RANKS`, `PUBLISHED_ROWS` of each


def measure(
    model_dir: Path,
    *,
    lanes: int = 2,
    tp: int = 2,
    kernels: str = "auto",
    dtype: str = "bfloat16",
    batches: Sequence[int] = (1, 8, 32),
    prompt_rows: int = 256,
    num_turns: int = NUM_TURNS,
    show: Show = lambda done, total: None,
) -> BitsReport:
    """`show(turns taken, turns in all)`. Errors: CheckpointError, LayoutError."""
    architecture = read_architecture(model_dir)
    layout = first_layout(architecture, lanes=lanes, tp=tp)
    chosen = select_kernels(kernels, dtype)
    orders = _LIBRARY if chosen.name == "reference" else _OTHERS
    cases = _cases(architecture, layout, batches, prompt_rows)
    places = max(num_places(max(batches, default=1), CONTEXT), CONTEXT + prompt_rows)
    with _shared_threads(layout.world_size):
        exact = select_kernels("reference", "float32")
        with BitsWorld(model_dir, layout, exact, num_places=places) as world:
            offs = [_offs(world, orders, batch) for _, batch in cases]
        costs = []
        with BitsWorld(model_dir, layout, chosen, num_places=places) as world:
            for number, ((step, batch), off) in enumerate(zip(cases, offs, strict=True)):
                turns = (number * num_turns, len(cases) * num_turns)
                costs.append(_cost(world, orders, step, batch, num_turns, off, partial(_tell, show, *turns)))
    return BitsReport(
        model=str(model_dir),
        kernels=chosen.name,
        dtype=dtype,
        lanes=lanes,
        tp=tp,
        num_ranks=layout.world_size,
        num_turns=num_turns,
        cases=tuple(costs),
        published=published_bytes(PUBLISHED_ROWS, PUBLISHED_RANKS),
    )


def published_bytes(num_rows: int, num_ranks: int) -> tuple[FormBytes, ...]:
    """Of K2's own dimensions, where the router chooses evenly: rows in float8, outputs in bfloat16."""
    architecture = find_architecture(KIMI_K2)
    width, block = architecture.hidden_size, architecture.scale_block
    assert block is not None, "K2's experts are quantised"
    row_bytes, out_bytes = width + 4 * -(-width // block), 2 * width
    rule = CapacityRule(_CAPACITY_FACTOR, architecture.top_k, 1 / num_ranks)
    layer = EvenLayer(num_rows, num_ranks, architecture.top_k, row_bytes, out_bytes)
    forms = {
        "exact": layer.exact(),
        "padded": layer.padded(rule.capacity(num_rows)),
        "pre-reduced": layer.pre_reduced(),
    }
    return tuple(
        FormBytes(form=form, out_bytes=found.out, home_bytes=found.home) for form, found in forms.items()
    )


def _cases(
    architecture: Architecture, layout: Layout, batches: Sequence[int], prompt_rows: int
) -> list[tuple[str, Batch]]:
    tp, vocab_size = layout.tp, architecture.vocab_size
    decodes = [("decode", decode_batch(num_rows, CONTEXT, tp, vocab_size)) for num_rows in batches]
    return [("prompt", prompt_batch(prompt_rows, CONTEXT, tp, vocab_size)), *decodes]


def _tell(show: Show, done: int, total: int, num_turns: int) -> None:
    show(done + num_turns, total)


def _cost(
    world: BitsWorld,
    orders: Sequence[Order],
    step: str,
    batch: Batch,
    num_turns: int,
    offs: Sequence[float],
    tell: Callable[[int], None],
) -> BitsCost:
    sent = [_sent(world, order, batch) for order in orders]  # the first step of each warms it up
    times_ms: list[dict[int, float]] = []
    for turn in range(num_turns):
        places = [(turn + i) % len(orders) for i in range(len(orders))]  # nobody is always first
        times_ms.append({i: _time_ms(world, orders[i], batch) for i in places})
        tell(turn + 1)
    costs = tuple(
        OrderCost(
            order=order.name,
            step_ms=median(took_ms[i] for took_ms in times_ms),
            same_bits_ratio=median(took_ms[0] / took_ms[i] for took_ms in times_ms),
            lane_bytes=sent[i].lane_bytes,
            expert_bytes=sent[i].expert_bytes,
            off=offs[i],
        )
        for i, order in enumerate(orders)
    )
    return BitsCost(step=step, num_rows=batch.num_rows, orders=costs)


def _sent(world: BitsWorld, order: Order, batch: Batch) -> Sent:
    before = world.sent()
    world.step(order, batch)
    return world.sent() - before


def _time_ms(world: BitsWorld, order: Order, batch: Batch) -> float:
    started_s = time.perf_counter()
    world.step(order, batch)
    return (time.perf_counter() - started_s) * 1e3


def _offs(world: BitsWorld, orders: Sequence[Order], batch: Batch) -> list[float]:
    """Of each order. They are the same mathematics, so a typical row is close; one whose router was near a
    tie may have gone to another expert.
    """
    wanted_SV = world.step(SAME_BITS, batch)
    offs = [_off(world.step(order, batch), wanted_SV) for order in orders]
    assert max(offs) < FARTHEST, f"an order that computes something else: {offs}"
    return offs


def _off(found_SV: Tensor, wanted_SV: Tensor) -> float:
    off_S = (found_SV - wanted_SV).abs().amax(dim=1) / wanted_SV.abs().amax(dim=1)
    return float(off_S.median())


@contextmanager
def _shared_threads(num_ranks: int) -> Iterator[None]:
    """Each rank computes on its share of the cores, as it would in a process of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before // num_ranks, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
