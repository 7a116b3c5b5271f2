"""A model in this process, ranks as threads: how fast it reads prompts and decodes, and what bounds it.

For each batch that many random prompts at once: until the last of them has its first token it reads prompts,
from there it decodes, until there are `decode_tokens` more for each. Nothing stops early, and no prompt finds
a prefix.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil
import torch

from k2dist.bench.weight_floor import step_bytes, touched_experts
from k2dist.config import Architecture, read_architecture
from k2dist.engine import Feed, Generated, LocalWorld
from k2dist.engine.kernels import select_kernels
from k2dist.errors import UsageError
from k2dist.ids import RequestId
from k2dist.messages import Message, RankStats, Request, Sampling
from k2dist.parallel import first_layout
from k2dist.parallel.published import published_tensors
from k2dist.scheduler import Limits

PAGE_TOKENS = 64
READ_BYTES = 2**29  # much more than any cache
_NUM_READS = 7
_STEP_TOKENS = 512  # prompt rows of a step, at least: more take memory and, measured, no less time
_WAIT_S = 1.0
_RUNS_ON = 256  # steps that may be taken before somebody sees that enough have been

Show = Callable[[int, int], None]


class BatchCost(Message, frozen=True, kw_only=True):
    """`batch` sequences over all lanes. Times are means over the decoding steps, of rank 0."""

    batch: int
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    num_steps: int
    step_ms: float  # wall time
    device_ms: float  # forward and sample
    host_ms: float  # plan, agreement, batch, commit; while the device works
    experts_touched: float  # in a step, of one MoE layer: see `weight_floor`
    floor_bytes: float  # weights that a step touches, each once, as the checkpoint holds them
    floor_share: float  # of the step's wall time: what reading these takes at the bandwidth measured


class OfflineReport(Message, frozen=True, kw_only=True):
    """Memory is this process's; `memory_ratio`: what peak adds to the start, over the checkpoint's bytes."""

    model: str
    kernels: str
    dtype: str
    lanes: int
    tp: int
    num_threads: int
    prompt_len: int
    decode_tokens: int
    checkpoint_bytes: int
    start_rss_bytes: int  # before the model was loaded
    peak_rss_bytes: int
    pss_bytes: int  # at the end, the model still loaded
    memory_ratio: float
    read_bytes_per_s: float  # the best of a few reads of `READ_BYTES` with all threads
    batches: tuple[BatchCost, ...]


def measure(
    model_dir: Path,
    *,
    lanes: int = 1,
    tp: int = 1,
    kernels: str = "auto",
    dtype: str = "bfloat16",
    prompt_len: int = 128,
    decode_tokens: int = 32,
    batches: Sequence[int] = (1, 8, 32),
    show: Show = lambda done, total: None,
) -> OfflineReport:
    """`show(tokens decoded, tokens in all)`. UsageError: beyond the context."""
    architecture = read_architecture(model_dir)
    layout = first_layout(architecture, lanes=lanes, tp=tp)
    lane_rows = -(-max(batches) // lanes)
    limits = Limits(step_tokens=2 * lane_rows + _STEP_TOKENS, max_running=lane_rows, max_waiting=max(batches))
    # Whoever is first decodes until the last prompt is read, and then as long as the others.
    num_prompt_steps = lane_rows * prompt_len // _STEP_TOKENS + prompt_len // limits.chunk_tokens + 2
    max_tokens = decode_tokens + num_prompt_steps + _RUNS_ON
    if prompt_len + max_tokens > architecture.max_positions:
        raise UsageError(
            f"--prompt-len={prompt_len} and --decode-tokens={decode_tokens}: up to {prompt_len + max_tokens} "
            f"positions, the context of this model holds {architecture.max_positions}; use less"
        )
    process = psutil.Process()
    start_rss_bytes = process.memory_info().rss
    world = LocalWorld(
        model_dir,
        layout,
        limits=limits,
        page_tokens=PAGE_TOKENS,
        num_pages=lane_rows * -(-(prompt_len + max_tokens) // PAGE_TOKENS),
        kernels=kernels,
        dtype=dtype,
        step_deadline_s=600.0,
        retain_s=0.0,
    )
    total = (1 + sum(batches)) * decode_tokens
    with world:
        bench = _Bench(
            world, architecture, prompt_len, decode_tokens, max_tokens, lambda done: show(done, total)
        )
        bench.run(1)  # first calls are slow: allocators, threads, the pages of the weights
        runs = [bench.run(batch) for batch in batches]
        peak_rss_bytes, pss_bytes = _peak_rss_bytes(), process.memory_full_info().pss
    read_bytes_per_s = read_bandwidth()
    checkpoint_bytes = sum(tensor.num_bytes for tensor in published_tensors(architecture))
    return OfflineReport(
        model=str(model_dir),
        kernels=select_kernels(kernels, dtype).name,
        dtype=dtype,
        lanes=lanes,
        tp=tp,
        num_threads=torch.get_num_threads(),
        prompt_len=prompt_len,
        decode_tokens=decode_tokens,
        checkpoint_bytes=checkpoint_bytes,
        start_rss_bytes=start_rss_bytes,
        peak_rss_bytes=peak_rss_bytes,
        pss_bytes=pss_bytes,
        memory_ratio=(peak_rss_bytes - start_rss_bytes) / checkpoint_bytes,
        read_bytes_per_s=read_bytes_per_s,
        batches=tuple(_cost(architecture, run, read_bytes_per_s) for run in runs),
    )


def read_bandwidth(num_bytes: int = READ_BYTES, num_reads: int = _NUM_READS) -> float:
    """Bytes per second of the fastest of some sums over so many bytes, by all of torch's threads."""
    x = torch.ones(num_bytes // 4)
    fastest_s = float("inf")
    for _ in range(num_reads):
        started_s = time.perf_counter()
        x.sum()
        fastest_s = min(fastest_s, time.perf_counter() - started_s)
    return num_bytes / fastest_s


@dataclass(frozen=True, slots=True)
class _Run:
    """One batch's measurements."""

    batch: int
    num_prompt_tokens: int
    prompt_s: float
    num_decoded: int
    decode_s: float
    before: RankStats  # of rank 0, when decoding began
    after: RankStats
    load_LE: list[list[int]]  # rows that each expert was given while decoding


class _Bench:
    def __init__(
        self,
        world: LocalWorld,
        architecture: Architecture,
        prompt_len: int,
        decode_tokens: int,
        max_tokens: int,
        tell: Callable[[int], None],
    ) -> None:
        self._world = world
        self._architecture = architecture
        self._prompt_len = prompt_len
        self._decode_tokens = decode_tokens
        self._sampling = Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self._rng = Random(0)
        self._num_requests = 0
        self._tell = tell
        self._num_decoded = 0  # of all batches so far

    def run(self, batch: int) -> _Run:
        ports = self._world.ports
        feed = Feed(ports, lane_outputs=batch)
        started_s = time.perf_counter()
        outputs = [feed.put(self._request(), number % len(ports))[0] for number in range(batch)]
        while not all(output.token_ids for output in outputs):
            self._step(feed)
        began_s, before, load = time.perf_counter(), self._world.ranks[0].stats(), self._load()
        num_before = _num_tokens(outputs)
        wanted = batch * self._decode_tokens
        while (num_decoded := _num_tokens(outputs) - num_before) < wanted:
            self._tell(self._num_decoded + num_decoded)
            self._step(feed)
        ended_s, after, load_after = time.perf_counter(), self._world.ranks[0].stats(), self._load()
        assert len(feed) == batch, "a sequence ended before the others had decoded"
        feed.cancel()
        self._num_decoded += wanted
        self._tell(self._num_decoded)
        return _Run(
            batch=batch,
            num_prompt_tokens=batch * self._prompt_len,
            prompt_s=began_s - started_s,
            num_decoded=num_decoded,
            decode_s=ended_s - began_s,
            before=before,
            after=after,
            load_LE=[
                [b - a for a, b in zip(layer, later, strict=True)]
                for layer, later in zip(load, load_after, strict=True)
            ],
        )

    def _request(self) -> Request:
        self._num_requests += 1
        vocab_size = self._architecture.vocab_size
        prompt = tuple(self._rng.randrange(vocab_size) for _ in range(self._prompt_len))
        return Request(
            request_id=RequestId(f"bench-{self._num_requests}"), prompt=prompt, sampling=self._sampling
        )

    def _step(self, feed: Feed) -> None:
        feed.wait(_WAIT_S)
        if any(port.has_failed for port in self._world.ports):
            self._world.raise_failure()

    def _load(self) -> list[list[int]]:
        """[moe layer][expert]: rows since the start, of all copies."""
        architecture = self._architecture
        load = [[0] * architecture.num_experts for _ in range(architecture.num_moe_layers)]
        for rank, place in zip(self._world.ranks, self._world.layout.ranks, strict=True):
            for layer, (counts, experts) in enumerate(
                zip(rank.stats().expert_load, place.experts, strict=True)
            ):
                for count, expert in zip(counts, experts, strict=True):
                    load[layer][expert] += count
        return load


def _cost(architecture: Architecture, run: _Run, read_bytes_per_s: float) -> BatchCost:
    num_steps = run.after.num_steps - run.before.num_steps
    step_s = run.decode_s / num_steps
    device_s = run.after.device_s_total - run.before.device_s_total
    host_s = run.after.host_s_total - run.before.host_s_total
    touched = touched_experts(run.load_LE, architecture.top_k, run.batch)
    floor_bytes = step_bytes(architecture, run.batch, touched)
    return BatchCost(
        batch=run.batch,
        prompt_tokens_per_s=run.num_prompt_tokens / run.prompt_s,
        decode_tokens_per_s=run.num_decoded / run.decode_s,
        num_steps=num_steps,
        step_ms=step_s * 1e3,
        device_ms=device_s / num_steps * 1e3,
        host_ms=host_s / num_steps * 1e3,
        experts_touched=sum(touched) / max(len(touched), 1),
        floor_bytes=floor_bytes,
        floor_share=floor_bytes / read_bytes_per_s / step_s,
    )


def _num_tokens(outputs: Sequence[Generated]) -> int:
    return sum(len(output.token_ids) for output in outputs)


def _peak_rss_bytes() -> int:
    """The high-water mark of this process since it started; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
