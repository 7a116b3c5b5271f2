"""What others published, predicted by this planner: how far its estimates can be trusted.

Each row is laid out as its source says and costed in two ways: as k2dist computes a step today (nothing
overlaps, `ASSUMED`), and as those systems do, with the exchange beside the arithmetic of another half of the
batch and experts balanced. `k2dist/planner/PUBLISHED.md` holds the table, and explains each ratio outside 0.5
to 2; the test recomputes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from k2dist.config.architecture import Architecture
from k2dist.planner.assumptions import ASSUMED
from k2dist.planner.cost import StepCost, StepModel
from k2dist.planner.devices import DEVICES
from k2dist.planner.site import Site
from k2dist.planner.work import LaneWork, Part

BALANCED = replace(ASSUMED, imbalance=1.1)  # experts moved and doubled by load, as rows 1, 9 and 13 do


@dataclass(frozen=True, kw_only=True)
class Row:
    """`number`: of `peers.md` section B. Every rank is a lane: all of them run attention data-parallel.

    `published`: tokens a second of one GPU. `decode`, `prompt`: rows of one GPU in a step, as published where
    `is_guess` is false.
    """

    number: str
    what: str
    device: str
    num_gpus: int
    slots: int  # of one GPU and layer
    decode: int = 0
    context: int = 0
    prompts: int = 0
    prompt_len: int = 0
    published: float
    is_guess: bool = False
    is_v3: bool = False


ROWS = (
    Row(
        number="1 P",
        what="SGLang, K2, prefill on 4 nodes, 2,000 in",
        device="h200",
        num_gpus=32,
        slots=12,
        prompts=8,
        prompt_len=2000,
        published=7000,
        is_guess=True,
    ),
    Row(
        number="1 D",
        what="SGLang, K2, decode on 12 nodes, 96 second copies, 480 a GPU",
        device="h200",
        num_gpus=96,
        slots=5,
        decode=480,
        context=2050,
        published=3000,
    ),
    Row(
        number="9 P",
        what="SGLang, V3, prefill on 4 nodes, 2,000 in",
        device="h100",
        num_gpus=32,
        slots=9,
        prompts=8,
        prompt_len=2000,
        published=54_500 / 8,
        is_guess=True,
        is_v3=True,
    ),
    Row(
        number="9 D",
        what="SGLang, V3, decode on 9 nodes, 256 a GPU, 2,000 in",
        device="h100",
        num_gpus=72,
        slots=4,
        decode=256,
        context=2050,
        published=22_300 / 8,
        is_v3=True,
    ),
    Row(
        number="13",
        what="vLLM, V3, decode on 32 GPUs, 2,000 in, 2,000 out",
        device="h200",
        num_gpus=32,
        slots=8,
        decode=256,
        context=3000,
        published=2200,
        is_guess=True,
        is_v3=True,
    ),
    Row(
        number="21 H200",
        what="TensorRT-LLM, V3, one node, 1,024 at once, 1,000 in, 2,000 out",
        device="h200",
        num_gpus=8,
        slots=32,
        decode=128,
        context=2000,
        prompts=1,
        prompt_len=64,  # for 128 decoding rows: half as many prompt tokens as generated ones
        published=1436,
        is_v3=True,
    ),
    Row(
        number="21 B200",
        what="TensorRT-LLM, V3 in FP4, one node, 3,072 at once, 1,000 in, 2,000 out",
        device="b200",
        num_gpus=8,
        slots=32,
        decode=384,
        context=2000,
        prompts=1,
        prompt_len=192,
        published=4548,
        is_v3=True,
    ),
    Row(
        number="21 B200",
        what="TensorRT-LLM, V3 in FP4, latents in FP8, one node, 7,168 at once, 1,000 in, 2,000 out",
        device="b200",
        num_gpus=8,
        slots=32,
        decode=896,
        context=2000,
        prompts=1,
        prompt_len=448,
        published=5393,
        is_v3=True,
    ),
)


@dataclass(frozen=True)
class Prediction:
    """Tokens a second of one GPU, and what binds."""

    row: Row
    here: float
    theirs: float
    binding: str

    @property
    def ratio(self) -> float:
        return self.here / self.row.published

    @property
    def their_ratio(self) -> float:
        return self.theirs / self.row.published


def predictions(k2: Architecture) -> tuple[Prediction, ...]:
    """`k2`: Kimi K2's architecture; DeepSeek-V3's is what differs from it."""
    return tuple(_predict(row, deepseek_v3(k2) if row.is_v3 else k2) for row in ROWS)


def deepseek_v3(k2: Architecture) -> Architecture:
    """What of V3 takes time (k2_facts 1.1); how its router groups experts does not."""
    return replace(
        k2,
        model_type="deepseek_v3",
        num_heads=128,
        num_experts=256,
        first_dense_layers=3,
        vocab_size=129_280,
    )


def table(found: tuple[Prediction, ...]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| row | what | published | as k2dist does it | ratio | overlapped, balanced | ratio | binds here |"
    yield "|---|---|---|---|---|---|---|---|"
    for one in found:
        row = one.row
        guess = " (batch guessed)" if row.is_guess else ""
        yield (
            f"| {row.number} | {row.what}{guess} | {row.published:,.0f} | {one.here:,.0f} | {one.ratio:.2f} "
            f"| {one.theirs:,.0f} | {one.their_ratio:.2f} | {one.binding} |"
        )


def _predict(row: Row, architecture: Architecture) -> Prediction:
    work = _work(row)
    tokens = row.decode or work.prompt_rows
    here = StepModel(_site(row, architecture)).even(work)
    theirs = StepModel(_site(row, architecture, is_balanced=True)).even(work)
    return Prediction(row, tokens / here.step_s, tokens / _overlapped_s(theirs), here.binding)


def _site(row: Row, architecture: Architecture, *, is_balanced: bool = False) -> Site:
    return Site(
        architecture=architecture,
        device=DEVICES[row.device],
        lanes=row.num_gpus,
        tp=1,
        world_size=row.num_gpus,
        ranks_per_node=8,
        slots=row.slots,
        all_slots=row.slots * row.num_gpus,
        padding=None,
        stream_bytes=2,
        assumed=BALANCED if is_balanced else ASSUMED,
    )


def _work(row: Row) -> LaneWork:
    prompt_rows = row.prompts * row.prompt_len
    rows = row.decode + prompt_rows
    return LaneWork(
        num_rows=rows,
        own_rows=rows,
        decode_rows=row.decode,
        num_keys=row.context,
        prompt_rows=prompt_rows,
        prompts=max(row.prompts, 1),
    )


def _overlapped_s(cost: StepCost) -> float:
    """Of two halves of a batch, one exchanged while the other computes."""
    away = (part for part in cost.parts if part.part in (Part.DISPATCH, Part.COMBINE))
    away_s = sum(part.network_s + part.wait_s for part in away)
    return max(away_s, cost.device_s - away_s)
