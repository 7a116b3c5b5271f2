"""Ways to reach a model that evaluation and tests share: a cluster's gRPC, or ranks in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from itertools import starmap
from pathlib import Path
from typing import NamedTuple, Protocol

from k2dist.config import read_architecture
from k2dist.demo.tools import Tool
from k2dist.engine.local import LocalWorld
from k2dist.messages import ChatMessage, Sampling
from k2dist.scheduler import Limits
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import PartialSampling
from k2dist.service.tls import ClientTls
from k2dist.service.whole_answer import WholeAnswer
from k2dist.text.chat import encode_chat
from k2dist.text.tokenizer import Tokenizer, end_token_ids
from k2dist.text.tool_calls import Answer, ToolCallParser, collect

MAX_TOKENS = 128
_AT_ONCE = 16
_TIMEOUT_S = 120.0


class Turn(NamedTuple):
    """A conversation whose next message is the assistant's."""

    messages: Sequence[ChatMessage]
    tools: Sequence[Tool]


class Chat(Protocol):
    """The assistant's messages to any number of turns, in their order. At a temperature each turn's seed is
    its number, so that equal turns give equal answers."""

    def __call__(self, turns: Sequence[Turn]) -> Sequence[Answer]: ...


class GrpcChat:
    """Through the coordinator of a running cluster, several requests at once."""

    def __init__(
        self, address: str, *, temperature: float = 0.0, tls: ClientTls | None = None, api_key: str = ""
    ) -> None:
        self._address, self._temperature = address, temperature
        self._tls, self._api_key = tls, api_key

    def __call__(self, turns: Sequence[Turn]) -> list[Answer]:
        return asyncio.run(self._answers(turns))

    async def _answers(self, turns: Sequence[Turn]) -> list[Answer]:
        places = asyncio.Semaphore(_AT_ONCE)
        async with AsyncClient(self._address, tls=self._tls, api_key=self._api_key) as client:

            async def answer(seed: int, turn: Turn) -> Answer:
                sampling = PartialSampling(temperature=self._temperature, seed=seed, max_tokens=MAX_TOKENS)
                async with places:
                    return await _answer(client, turn, sampling)

            return list(await asyncio.gather(*starmap(answer, enumerate(turns))))


async def _answer(client: AsyncClient, turn: Turn, sampling: PartialSampling) -> Answer:
    whole = WholeAnswer()
    tools = [dict(tool) for tool in turn.tools]
    async for event in client.chat(turn.messages, tools=tools, sampling=sampling, timeout_s=_TIMEOUT_S):
        whole.add(event)
    return Answer(whole.text, tuple(whole.tool_calls))


class LocalChat:
    """On one rank in this process, with the arithmetic that a cluster serves (`kernels`, `dtype`)."""

    def __init__(
        self, model_dir: Path, *, temperature: float = 0.0, kernels: str = "auto", dtype: str = "bfloat16"
    ) -> None:
        self._model_dir, self._kernels, self._dtype = model_dir, kernels, dtype
        self._temperature = temperature
        self._tokenizer = Tokenizer.load(model_dir)
        self._ends = end_token_ids(self._tokenizer, read_architecture(model_dir).eos_token_ids)

    def __call__(self, turns: Sequence[Turn]) -> list[Answer]:
        prompts = [encode_chat(self._tokenizer, turn.messages, turn.tools) for turn in turns]
        if not prompts:
            return []
        limits = Limits(max_waiting=len(prompts))
        samplings = [
            Sampling(temperature=self._temperature, seed=seed, max_tokens=MAX_TOKENS)
            for seed in range(len(prompts))
        ]
        with LocalWorld(self._model_dir, limits=limits, kernels=self._kernels, dtype=self._dtype) as world:
            outputs = world.generate(prompts, samplings)
        return [parse_answer(self._tokenizer, output.token_ids, self._ends) for output in outputs]


def parse_answer(tokenizer: Tokenizer, token_ids: Sequence[int], ends: Collection[int]) -> Answer:
    """The assistant message that these tokens write, up to the first end token."""
    stop = next((i for i, token_id in enumerate(token_ids) if token_id in ends), None)
    parser = ToolCallParser(tokenizer)
    return collect((*parser.push(token_ids[:stop]), *parser.finish(is_cut=stop is None)))
