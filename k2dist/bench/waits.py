"""What a user of a serving cluster waits for, over gRPC: the first token, and the next one.

first token      of a short prompt, when every lane sleeps, and when another request decodes
next token       of a request that decodes: alone, and while other prompts are computed beside it
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from k2dist.bench.percentiles import Percentiles
from k2dist.messages import Message
from k2dist.service.answer_events import Delta
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, PartialSampling

SETTLE_S = 0.3  # by then every lane sleeps, or the request beside decodes
_SHORT = tuple(range(1, 9))


class FirstToken(Message, frozen=True, kw_only=True):
    """From the request to its first token."""

    after_idle_ms: Percentiles
    beside_a_decode_ms: Percentiles


class NextToken(Message, frozen=True, kw_only=True):
    """Between two tokens of one that decodes. Prompts of `prompt_len` tokens come one after another."""

    prompt_len: int
    alone_ms: Percentiles
    beside_prompts_ms: Percentiles


def in_ms(waits_s: Sequence[float]) -> Percentiles:
    assert waits_s, "nothing was waited for"
    return Percentiles.of([1e3 * wait_s for wait_s in waits_s])


async def first_token(client: AsyncClient, num_samples: int, note: Callable[[], None]) -> FirstToken:
    """Both kinds in turn, so that the machine's moods fall on both."""
    idle_s, beside_s = [], []
    for _ in range(num_samples):
        await asyncio.sleep(SETTLE_S)
        idle_s.append(await _until_first(client, _SHORT))
        async with decoding(client):
            await asyncio.sleep(SETTLE_S)
            beside_s.append(await _until_first(client, _SHORT))
        note()
    return FirstToken(after_idle_ms=in_ms(idle_s), beside_a_decode_ms=in_ms(beside_s))


async def next_token(
    client: AsyncClient, *, prompt_len: int, window_s: float, num_windows: int, note: Callable[[], None]
) -> NextToken:
    """Windows without and with prompts in turn."""
    alone_s: list[float] = []
    beside_s: list[float] = []
    for window in range(num_windows):
        async with decoding(client) as gaps_s:
            await asyncio.sleep(SETTLE_S)
            gaps_s.clear()
            await asyncio.sleep(window_s)
            alone_s += gaps_s
            gaps_s.clear()
            until_s, number = time.monotonic() + window_s, 0
            while time.monotonic() < until_s:
                # No two begin alike: all of each prompt is computed.
                await _until_first(client, (1 + window, 1 + number % 200, *range(1, prompt_len - 1)))
                number += 1
            beside_s += gaps_s
        note()
    return NextToken(prompt_len=prompt_len, alone_ms=in_ms(alone_s), beside_prompts_ms=in_ms(beside_s))


@asynccontextmanager
async def decoding(client: AsyncClient) -> AsyncIterator[list[float]]:
    """One request that decodes meanwhile; the seconds between its tokens, as they come."""
    gaps_s: list[float] = []
    is_up = asyncio.Event()

    async def decode() -> None:
        endless = PartialSampling(temperature=0.0, max_tokens=4000, ignore_eos=True)
        last_s: float | None = None
        async for event in client.generate(ClientRequest(prompt=_SHORT, sampling=endless)):
            if isinstance(event, Delta):
                now_s = time.monotonic()
                if last_s is not None:
                    gaps_s.append((now_s - last_s) / len(event.token_ids))
                last_s = now_s
                is_up.set()

    task = asyncio.create_task(decode())
    try:
        await asyncio.wait_for(is_up.wait(), 60.0)
        yield gaps_s
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _until_first(client: AsyncClient, prompt: tuple[int, ...]) -> float:
    one = PartialSampling(temperature=0.0, max_tokens=1, ignore_eos=True)
    began_s = time.monotonic()
    first_s = None
    async for event in client.generate(ClientRequest(prompt=prompt, sampling=one)):
        if first_s is None and isinstance(event, Delta):
            first_s = time.monotonic() - began_s
    assert first_s is not None, "an answer without a token"
    return first_s
