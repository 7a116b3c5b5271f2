"""How much longer a decode step takes than its kernels: `python -m k2dist.rehearsal.device_step`.

One rank with K2's own widths, made-up weights and the engine's real steps (plan, forward, sample, read):
its experts stand in for all others. Wall time per step, and the sum of its kernels' times as the profiler
tells them. Issue 4 asks that a step be no more than 5% longer.

    python -m k2dist.rehearsal.device_step --experts 24 --decode 64 --context 4096     61 layers: about 96 GB
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice

import torch
from msgspec.structs import replace as replace_struct

from k2dist.checkpoint import RandomShard
from k2dist.comm import Alone, Exchange, StepAgreement
from k2dist.config import KIMI_K2, Architecture, find_architecture
from k2dist.engine.device_thread import DeviceThread
from k2dist.engine.form import FormRule
from k2dist.engine.forward import ForwardPass, Model
from k2dist.engine.graphs import CudaRecorder, Recorder
from k2dist.engine.guard import RowGuard
from k2dist.engine.kernels import select_kernels
from k2dist.engine.recording import record_sizes
from k2dist.engine.sequences import Sequences
from k2dist.engine.solo import solo_exchange
from k2dist.engine.steps import Step, Steps
from k2dist.ids import Generation
from k2dist.messages import StepPlan
from k2dist.parallel import Layout, first_layout
from k2dist.parallel.buckets import buckets, spare_places
from k2dist.planner import Terms, form_named
from k2dist.planner.fewer_layers import first_layers, most_layers
from k2dist.rehearsal.load import Load
from k2dist.rehearsal.memory import usable_bytes
from k2dist.rehearsal.rank import made_up_cache, made_up_weights

PAGE_TOKENS = 64
_RECORD_S = 120.0
WARM_STEPS, TIMED_STEPS, PROFILED_STEPS = 6, 40, 10


def made_up_model(architecture: Architecture, layout: Layout, load: Load, device: torch.device) -> Model:
    """Rank 0 of `layout`, its cache full."""
    kernels = select_kernels("auto", "bfloat16", device)
    shard = RandomShard(architecture.scale_block, device)
    num_spare = spare_places(load.decode)
    with torch.inference_mode():
        return Model(
            made_up_weights(architecture, layout, 0, kernels, shard),
            made_up_cache(
                architecture, load.num_pages(PAGE_TOKENS), PAGE_TOKENS, kernels, shard, device, num_spare
            ),
            architecture,
            kernels,
            1,
            frozenset(),
            device,
        )


class Rank:
    """A world of one, stepping through `load` as the step loop does."""

    def __init__(self, model: Model, exchange: Exchange, load: Load, *, graphs: bool) -> None:
        rule = FormRule.of(
            tp=1,
            world_size=1,
            padding=None,
            most_rows=load.decode,
            most_pages=load.num_pages(PAGE_TOKENS),
            split_tokens=None,
        )
        self._recorder: Recorder | None = None
        if graphs and model.device.type == "cuda":
            rule = rule.only(rule.buckets[:1])  # of this load's rows
            self._recorder = CudaRecorder(calls_outside=False)
        else:
            rule = rule.only(())
        self._rule = rule
        self.passes = ForwardPass(model, Alone(), exchange, next(iter(rule.buckets), None))
        self._thread = DeviceThread("bench")
        self._sequences = Sequences(PAGE_TOKENS, 1)
        self._steps = Steps(
            model, self._sequences, RowGuard(), Alone(), exchange, rule, self.passes, self._thread
        )
        self._plans = load.plans(PAGE_TOKENS, model.architecture.vocab_size)

    def steps(self) -> Iterator[float]:
        """Seconds from the end of one step to the end of the next; one is always planned ahead."""
        before: Step | None = None
        with self._thread:
            record_sizes(self._rule, self.passes, self._recorder, Alone(), self._thread, limit_s=_RECORD_S)
            ended_s = time.perf_counter()
            for plan in self._plans:
                self._sequences.apply(plan)
                launched = self._steps.forward(plan, before, self._word(plan))
                if before is not None:
                    self._steps.finish(before)
                    now_s = time.perf_counter()
                    yield now_s - ended_s
                    ended_s = now_s
                self._steps.sample(launched)
                before = launched

    def _word(self, plan: StepPlan) -> StepAgreement:
        return StepAgreement(
            generation=Generation(0),
            step=plan.step,
            num_rows=len(plan.grants),
            is_idle=False,
            is_stopping=False,
            has_decodes=True,
            num_pages=self._sequences.num_pages(plan),
        )


def measure(model: Model, exchange: Exchange, load: Load, *, graphs: bool) -> dict[str, object]:
    """Milliseconds of a step, and of its kernels where the device has a profiler."""
    rank = Rank(model, exchange, load, graphs=graphs)
    steps = rank.steps()
    list(islice(steps, WARM_STEPS))
    times_s = sorted(islice(steps, TIMED_STEPS))
    found: dict[str, object] = {
        "graphs": graphs,
        "step_ms": 1e3 * times_s[len(times_s) // 2],
        "steps_replayed": rank.passes.num_steps_replayed,
    }
    if model.device.type == "cuda":
        kernels_ms = _kernels_ms(steps)
        found |= {"kernels_ms": kernels_ms, "longer": 1e3 * times_s[len(times_s) // 2] / kernels_ms - 1}
    list(steps)
    return found


def _kernels_ms(steps: Iterator[float]) -> float:
    """Of one step, copies of memory left out: they are beside kernels, or tiny."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        list(islice(steps, PROFILED_STEPS))
    total_us: float = sum(
        event.self_device_time_total
        for event in profile.key_averages()
        if not event.key.startswith(("Memcpy", "Memset"))
    )
    return total_us / PROFILED_STEPS / 1e3


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m k2dist.rehearsal.device_step", description=__doc__)
    parser.add_argument("--layers", type=int, help="of K2's 61, the first of them dense; all that fit")
    parser.add_argument("--experts", type=int, default=24, help="on this rank, of K2's 384")
    parser.add_argument("--decode", type=int, default=64, help="sequences, a row of each a step")
    parser.add_argument("--context", type=int, default=4096, help="keys that each sees")
    parser.add_argument("--hidden", type=int, help="another hidden size, for a machine without a GPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = find_architecture(KIMI_K2)
    if options.hidden is not None:
        architecture = replace_struct(architecture, hidden_size=options.hidden, vocab_size=4096)
    load = Load(
        decode=options.decode,
        context=options.context,
        prompt_tokens=0,
        num_steps=WARM_STEPS + TIMED_STEPS + PROFILED_STEPS + 2,
    )
    layout = first_layout(architecture, lanes=architecture.num_experts // options.experts, tp=1)
    num_layers = options.layers or _layers_that_fit(architecture, layout, load, device)
    few, few_layout = first_layers(architecture, layout, num_layers)
    model = made_up_model(few, few_layout, load, device)
    exchange = solo_exchange(few, few_layout.place(0), device)
    for graphs in (False, True):
        found = measure(model, exchange, load, graphs=graphs)
        head = {
            "device": _name(device),
            "layers": num_layers,
            "decode": load.decode,
            "context": load.context,
        }
        print(json.dumps(head | found), flush=True)


def _layers_that_fit(architecture: Architecture, layout: Layout, load: Load, device: torch.device) -> int:
    kernels = select_kernels("auto", "bfloat16", device)
    num_pages = load.num_pages(PAGE_TOKENS)
    terms = Terms(
        form=form_named(kernels.name, kernels.dtype.itemsize),
        page_tokens=PAGE_TOKENS,
        step_tokens=load.decode,
        max_samples=load.decode,
        reserve_bytes=0,
        device_bytes=None,
        recorded=buckets(load.decode, num_pages)[:1],
    )
    found = most_layers(architecture, layout, terms, 0, num_pages, usable_bytes(device))
    if found is None:
        raise SystemExit("this device has no room for two layers: use fewer --experts, --decode or --context")
    return found.num_layers


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main(sys.argv[1:])
