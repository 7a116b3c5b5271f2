"""OpenAI's request bodies as they come, field by field. Pure.

Source: OpenAI's API reference, chat/completions and completions; `partial` is Moonshot's; top_k, min_p,
repetition_penalty, min_tokens, stop_token_ids and ignore_eos are spelled as vLLM spells them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from k2dist.service.http_body import Uint32


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class TextPart(_Strict, frozen=True, kw_only=True):
    text: str
    type: Literal["text"]
    cache_control: Any = None  # LiteLLM hands on Anthropic's; prefixes are cached without being asked


class CalledFunction(_Strict, frozen=True, kw_only=True):
    name: str
    arguments: str = ""


class BodyCall(_Strict, frozen=True, kw_only=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None  # left by clients that gathered a stream


class BodyMessage(_Strict, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[BodyCall] | None = None
    tool_call_id: str | None = None
    partial: bool = False
    # What clients hand back of an answer, and the template does not show.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Any = None
    reasoning_content: Any = None


class StreamOptions(_Strict, frozen=True, kw_only=True):
    include_usage: bool = False
    include_obfuscation: Any = None


class NamedSchema(_Strict, frozen=True, kw_only=True):
    schema: dict[str, Any]
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class NamedFunction(_Strict, frozen=True, kw_only=True):
    name: str


class NamedChoice(_Strict, frozen=True, kw_only=True):
    type: Literal["function"]
    function: NamedFunction


class Body(_Strict, frozen=True, kw_only=True):
    """What both kinds of body have."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Uint32 = 1
    max_tokens: Uint32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Uint32, float] = {}
    seed: int | None = None
    stop: str | list[str] = []
    top_k: Uint32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Uint32 | None = None
    stop_token_ids: list[Uint32] = []
    ignore_eos: bool | None = None
    detached: bool = False  # losing the stream does not end the request: it can be resumed


class ChatBody(Body, frozen=True, kw_only=True):
    messages: list[BodyMessage]
    max_completion_tokens: Uint32 | None = None
    logprobs: bool = False
    top_logprobs: Uint32 | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None


TokenIds = list[Uint32]


class CompletionBody(Body, frozen=True, kw_only=True):
    prompt: str | list[str | Uint32 | TokenIds]
    logprobs: Uint32 | None = None
    echo: bool = False
    best_of: Uint32 | None = None
    suffix: Annotated[str, Meta(max_length=0)] = ""
