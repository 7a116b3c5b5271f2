"""What a client asks for, in no API's words: gRPC now and HTTP later are translated into it."""

from __future__ import annotations

from typing import Any

import msgspec

from k2dist.messages import ChatMessage, Message


class PartialSampling(Message, frozen=True, kw_only=True):
    """`messages.Sampling` as a client gives it: None where it said nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None


class Chat(Message, frozen=True, kw_only=True):
    """A conversation that the assistant is to continue. `tools`: JSON objects just as sent."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[dict[str, Any], ...] = ()


class ClientRequest(Message, frozen=True, kw_only=True):
    """One request for generation. `prompt`: text encoded as it is, token ids, or a conversation."""

    prompt: str | tuple[int, ...] | Chat
    sampling: PartialSampling = PartialSampling()
    request_id: str | None = None  # None: drawn by the server
    num_outputs: int = 1
    tenant: str = ""
    priority: int = 0
    detached: bool = False  # True: losing the stream does not end the request
    model: str = ""  # empty: the one that is served


class Position(Message, frozen=True, kw_only=True):
    """Where to read on in one output."""

    output_index: int
    token_index: int
