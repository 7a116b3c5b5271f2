"""Every size of a step is recorded before the first request, by all ranks together, one size after another.

    rank 0   goes on? ─ record 256 rows ─ goes on? ─ record 192 rows ─ ... ─ goes on? no, its time is over
    rank 1   goes on? ─ record 256 rows ─ goes on? ─ record 192 rows ─ ... ─ goes on? yes; then none does

Graphs hold collectives, so a size is recorded on all ranks or on none; a rank that cannot record any says so
before the first. Largest first: smaller ones find their memory there, and a step whose own size is missing
takes a larger one. Steps that no recorded size holds run eagerly, and are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from k2dist.comm import Communicator
from k2dist.engine.device_thread import DeviceThread
from k2dist.engine.form import FormRule
from k2dist.engine.forward import ForwardPass
from k2dist.engine.graphs import Recorder
from k2dist.parallel.buckets import Bucket

Note = Callable[[int, int], object]  # how many of how many


def record_sizes(
    rule: FormRule,
    passes: ForwardPass,
    recorder: Recorder | None,
    control: Communicator,
    thread: DeviceThread,
    *,
    limit_s: float,
    note: Note = lambda *_: None,
    clock: Callable[[], float] = time.monotonic,
) -> FormRule:
    """Record the rule's sizes until they or any rank's `limit_s` are over; the rule that keeps to them.

    Collective over `control`, the group of all world ranks on the CPU, and the groups of `passes`. `thread`
    is open. `recorder` None: this rank cannot, so no rank does.
    """
    give_up_s = clock() + limit_s
    recorded: list[Bucket] = []
    for bucket in rule.buckets:
        goes_on = recorder is not None and clock() < give_up_s
        if not all(of_rank for (of_rank,) in control.exchange_ints([int(goes_on)])):
            break
        assert recorder is not None, "a rank that cannot record has just said so"
        thread.launch(partial(passes.record, rule.recorded(bucket), recorder)).result()
        recorded.append(bucket)
        note(len(recorded), len(rule.buckets))
    return rule.only(tuple(recorded))
