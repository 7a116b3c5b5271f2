"""What became of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from k2dist.engine import Generated
from k2dist.errors import RequestError
from k2dist.llm.ask import Ask, Prepare, Prompt
from k2dist.messages import ChatMessage, FinishReason, Request, Sampling, TokenLogprob, ToolCall, Usage
from k2dist.text import collect

Finish = Literal["stop", "length", "tool_calls", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One of a prompt's outputs.

    `token_ids` hold the token that ended it, `text` does not. `finish_reason`: "stop" (an end token, stop id
    or stop string: `stop_match`), "length", "tool_calls" (stopped, having called a tool), or "timeout".
    """

    token_ids: tuple[int, ...]
    text: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: Finish
    stop_match: str | int | None
    logprobs: tuple[TokenLogprob, ...] | None  # None: not asked for

    @property
    def message(self) -> ChatMessage:
        """The assistant's turn, for the next round of the conversation."""
        return ChatMessage(role="assistant", content=self.text, tool_calls=self.tool_calls)


@dataclass(frozen=True, slots=True)
class Output:
    """What became of one prompt: `outputs`, as many as `sampling.n`; or none, and an `error`.

    `text`, `token_ids`, `tool_calls`, `logprobs` and `message` are those of outputs[0], which is the only one
    unless more were asked for. An error is of this prompt alone and names the field to change, or none where
    the prompt led to numbers that are not finite.
    """

    prompt: Prompt
    prompt_token_ids: tuple[int, ...] = ()  # none with an error
    sampling: Sampling | None = None  # every field resolved, the seed too; None with an error
    outputs: tuple[Completion, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # of prompt_token_ids[1:]; None: not asked for
    usage: Usage = field(default_factory=Usage)
    error: RequestError | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text if self.outputs else ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids if self.outputs else ()

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.outputs[0].tool_calls if self.outputs else ()

    @property
    def finish_reason(self) -> Finish:
        return self.outputs[0].finish_reason if self.outputs else "error"

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.outputs[0].logprobs if self.outputs else None

    @property
    def message(self) -> ChatMessage:
        """The assistant's turn; raises the error if there is one."""
        if self.error is not None:
            raise self.error
        return self.outputs[0].message


def answered(ask: Ask, request: Request, generated: Sequence[Generated], prepare: Prepare) -> Output:
    """The output of a request all of whose outputs have ended."""
    sampling = request.sampling
    usages = [output.usage or Usage(completion_tokens=len(output.token_ids)) for output in generated]
    return Output(
        prompt=ask.prompt,
        prompt_token_ids=request.prompt,
        sampling=sampling,
        outputs=tuple(_completion(output, ask.prompt, sampling, prepare) for output in generated),
        prompt_logprobs=None if sampling.prompt_logprobs is None else tuple(generated[0].prompt_logprobs),
        usage=Usage(
            prompt_tokens=len(request.prompt),
            cached_tokens=min(usage.cached_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
        ),
    )


def _completion(output: Generated, prompt: Prompt, sampling: Sampling, prepare: Prepare) -> Completion:
    reader = prepare.reader(prompt, sampling)
    is_cut = output.finish is not FinishReason.STOP or isinstance(output.stop_match, str)
    answer = collect((*reader.push(output.token_ids), *reader.finish(is_cut=is_cut)))
    if output.finish is FinishReason.LENGTH:
        finish: Finish = "length"
    elif output.finish is FinishReason.ABORT:  # nobody else ends what is given back
        finish = "timeout"
    else:
        finish = "tool_calls" if reader.num_calls > 0 else "stop"
    return Completion(
        token_ids=tuple(output.token_ids),
        text=answer.content,
        tool_calls=answer.tool_calls,
        finish_reason=finish,
        stop_match=output.stop_match,
        logprobs=None if sampling.logprobs is None else tuple(output.logprobs),
    )
