"""Who comes when, with what: a trace, a rate, or so many clients that each wait for their answer.

A trace is JSON lines, in order of time:

    {"at_s": 0.5, "prompt_len": 1200, "output_len": 300, "prefix": 3, "prefix_len": 1000, "tenant": "a"}

`prefix` and `prefix_len` (default: none): prompts of equal `prefix` begin with the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from k2dist.errors import UsageError
from k2dist.ids import RequestId
from k2dist.messages import Message, Request, Sampling
from k2dist.planner.chance import Chance
from k2dist.planner.estimate import Workload


class Arrival(Message, frozen=True, kw_only=True):
    at_s: float
    prompt_len: int
    output_len: int
    prefix: int = 0
    prefix_len: int = 0
    tenant: str = ""


class Mix(Message, frozen=True, kw_only=True):
    """Of made-up requests. `sigma`: of log-normal lengths round the workload's; `shared`: of each prompt, how
    much is the beginning that it has in common with all others of its one of `prefixes` groups."""

    workload: Workload
    sigma: float = 0.5
    shared: float = 0.0
    prefixes: int = 16


def read_trace(text: str, source: str) -> tuple[Arrival, ...]:
    """Raises `UsageError` naming the line that is wrong."""
    decoder = msgspec.json.Decoder(Arrival)
    found: list[Arrival] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            arrival = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise UsageError(f"{source}, line {number}: {error}; see k2dist/planner/arrivals.py") from error
        fault = _fault(arrival, found[-1].at_s if found else 0.0)
        if fault:
            raise UsageError(f"{source}, line {number}: {fault}")
        found.append(arrival)
    if not found:
        raise UsageError(f"{source}: holds no request")
    return tuple(found)


def made_up(mix: Mix, num: int, rate: float | None, seed: int = 0) -> Iterator[Arrival]:
    """`num` requests at `rate` a second, apart by chance; all at once without one."""
    chance, at_s = Chance(seed), 0.0
    workload = mix.workload
    for _ in range(num):
        if rate is not None:
            at_s += chance.exponential(1.0 / rate)
        prompt_len = max(chance.spread(workload.prompt_len, mix.sigma), 2)
        yield Arrival(
            at_s=at_s,
            prompt_len=prompt_len,
            output_len=chance.spread(workload.output_len, mix.sigma),
            prefix=chance.integer() % mix.prefixes,
            prefix_len=int(prompt_len * mix.shared),
        )


def request_of(arrival: Arrival, number: int, vocab_size: int, max_positions: int) -> Request:
    """What a lane admits for it: prompts differ from each other from behind their common prefix on.

    Tokens are few different ones, so that 50,000 prompts fit into memory; the first two say whose they are.
    """
    own_len = arrival.prompt_len - arrival.prefix_len
    group, rest = 1 + arrival.prefix, number + 1
    prefix = (group % vocab_size,) * arrival.prefix_len
    own = (rest // vocab_size % vocab_size, rest % vocab_size, *(0,) * (own_len - 2))[:own_len]
    return Request(
        request_id=RequestId(str(number)),
        prompt=prefix + own,
        tenant=arrival.tenant,
        sampling=Sampling(
            max_tokens=min(arrival.output_len, max_positions - arrival.prompt_len),
            ignore_eos=True,
            seed=number,
        ),
    )


def _fault(arrival: Arrival, before_s: float) -> str:
    if arrival.at_s < before_s:
        return f"at_s={arrival.at_s:g} is before {before_s:g}; lines are in order of time"
    if arrival.prompt_len < 1 or arrival.output_len < 1:
        return "prompt_len and output_len are at least 1"
    if not 0 <= arrival.prefix_len < arrival.prompt_len or arrival.prefix < 0:
        return "prefix_len is at least 0 and less than prompt_len, prefix at least 0"
    return ""
