"""OpenAI's request bodies (`openai_bodies`) as k2dist's requests: chat completions and completions. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from k2dist.errors import RequestError
from k2dist.messages import ChatMessage, Constraint, JsonObject, JsonSchema, Message, ToolCall
from k2dist.service.client_request import Chat, ClientRequest, PartialSampling
from k2dist.service.http_body import read_fields
from k2dist.service.openai_bodies import (
    Body,
    BodyMessage,
    ChatBody,
    CompletionBody,
    NamedChoice,
    ResponseFormat,
    TokenIds,
)
from k2dist.text.chat import ToolChoice

MAX_CHOICES = 128  # of all prompts of one body together
MAX_SEED = 2**64 - 1
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for completions only

# Fields that are accepted and change nothing here: whose request it is, billing, caching, routing, storage.
HARMLESS = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Ours -> theirs, for refusals that come from the coordinator.
CHAT_FIELDS = {"num_outputs": "n", "prompt": "messages"}
COMPLETION_FIELDS = {"num_outputs": "n", "token_ids.ids": "prompt"}


class OpenAIAsked(Message, frozen=True, kw_only=True):
    """What one body asks. One request for each prompt, `num_outputs` choices of each."""

    requests: tuple[ClientRequest, ...]
    is_chat: bool
    is_streamed: bool = False
    shows_usage: bool = False  # in a stream, as its last chunk
    shows_logprobs: bool = False
    echoes: bool = False  # the prompt stands before each answer

    @property
    def num_outputs(self) -> int:
        return self.requests[0].num_outputs

    @property
    def num_choices(self) -> int:
        return len(self.requests) * self.num_outputs


def read_chat_body(fields: dict[str, Any], request_id: str) -> OpenAIAsked:
    """A chat completion. RequestError names what is wrong, or cannot be done here."""
    body = read_fields(fields, ChatBody, HARMLESS)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs", "needs logprobs: true")
    tools = read_tools(body.tools)
    chat = Chat(
        messages=tuple(_read_message(message) for message in body.messages),
        tools=() if body.tool_choice == "none" else tools,  # what is not shown is not called
        tool_choice=_read_choice(body),
        is_partial=_read_partial(body.messages),
    )
    sampling = _sampling(
        body,
        max_tokens=_max_tokens(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=_read_format(body.response_format),
    )
    request = ClientRequest(
        prompt=chat,
        sampling=sampling,
        request_id=request_id,
        num_outputs=body.n,
        detached=body.detached,
        model=body.model,
    )
    return OpenAIAsked(
        requests=(request,),
        is_chat=True,
        is_streamed=body.stream,
        shows_usage=_shows_usage(body),
        shows_logprobs=body.logprobs,
    )


def read_completion_body(fields: dict[str, Any], request_id: str) -> OpenAIAsked:
    """A completion; several prompts are several requests, `request_id`-0 and so on."""
    body = read_fields(fields, CompletionBody, HARMLESS)
    if body.best_of not in (None, body.n):
        raise RequestError("best_of", "only what n says is generated; leave it out")
    prompts = _read_prompts(body.prompt)
    if not 1 <= len(prompts) * body.n <= MAX_CHOICES:
        raise RequestError(
            "n", f"{len(prompts)} prompts x {body.n} are not 1 to {MAX_CHOICES} choices; send fewer"
        )
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = _sampling(
        body,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    requests = tuple(
        ClientRequest(
            prompt=prompt,
            sampling=sampling,
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{index}",
            num_outputs=body.n,
            detached=body.detached,
            model=body.model,
        )
        for index, prompt in enumerate(prompts)
    )
    return OpenAIAsked(
        requests=requests,
        is_chat=False,
        is_streamed=body.stream,
        shows_usage=_shows_usage(body),
        shows_logprobs=body.logprobs is not None,
        echoes=body.echo,
    )


def read_tools(tools: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Tools as the template shows them: just as sent."""
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise RequestError(
                f"tools[{index}]", 'not a function; use {"type": "function", "function": {...}}'
            )
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f"tools[{index}].function.name", "missing; name the function")
        if not isinstance(function.get("parameters", {}), dict):
            raise RequestError(f"tools[{index}].function.parameters", "not an object; give a JSON schema")
    return tuple(tools)


def _sampling(
    body: Body,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    constraint: Constraint | None = None,
) -> PartialSampling:
    if body.seed is not None and not 0 <= body.seed <= MAX_SEED:
        raise RequestError("seed", f"{body.seed} is outside 0..{MAX_SEED}")
    return PartialSampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        seed=body.seed,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        constraint=constraint,
    )


def _max_tokens(body: ChatBody) -> int | None:
    """`max_tokens` is the older name."""
    old, new = body.max_tokens, body.max_completion_tokens
    if None not in (old, new) and old != new:
        raise RequestError("max_tokens", f"{old}, but max_completion_tokens is {new}; give one of them")
    return old if new is None else new


def _shows_usage(body: Body) -> bool:
    if body.stream_options is None:
        return False
    if not body.stream:
        raise RequestError("stream_options", "only with stream: true")
    return body.stream_options.include_usage


def _read_message(message: BodyMessage) -> ChatMessage:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    calls = (
        ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or ()
    )
    return ChatMessage(
        role="system" if message.role == "developer" else message.role,
        content=content,
        name=message.name,
        tool_calls=tuple(calls),
        tool_call_id=message.tool_call_id,
    )


def _read_partial(messages: list[BodyMessage]) -> bool:
    for index, message in enumerate(messages):
        if message.partial and (message.role != "assistant" or index + 1 < len(messages)):
            raise RequestError(f"messages[{index}].partial", "only the last message, of the assistant")
    return bool(messages) and messages[-1].partial


def _read_choice(body: ChatBody) -> ToolChoice:
    choice = body.tool_choice
    if isinstance(choice, NamedChoice):
        name = choice.function.name
        if name not in (tool["function"]["name"] for tool in body.tools):
            raise RequestError("tool_choice", f"{name!r} is not one of tools")
        return ToolChoice(mode="named", name=name, is_parallel=body.parallel_tool_calls)
    if choice == "required" and not body.tools:
        raise RequestError("tool_choice", "required, but there are no tools")
    return ToolChoice(mode=choice, is_parallel=body.parallel_tool_calls)


def _read_format(form: ResponseFormat | None) -> Constraint | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return JsonObject()
    if form.json_schema is None:
        raise RequestError("response_format.json_schema", "missing")
    return JsonSchema(schema=msgspec.json.encode(form.json_schema.schema).decode())


def _read_prompts(prompt: str | list[str | int | TokenIds]) -> tuple[str | tuple[int, ...], ...]:
    """One prompt as text or ids, or a list of such."""
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and all(isinstance(item, int) for item in prompt):
        return (tuple(item for item in prompt if isinstance(item, int)),)
    prompts: list[str | tuple[int, ...]] = []
    for index, item in enumerate(prompt):
        if isinstance(item, int):
            raise RequestError(f"prompt[{index}]", "a token id between prompts; use one kind")
        prompts.append(item if isinstance(item, str) else tuple(item))
    return tuple(prompts)
