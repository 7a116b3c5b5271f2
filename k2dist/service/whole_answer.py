"""One output put together from its events, as every client has to do: text, tool calls, the end."""

from __future__ import annotations

from msgspec.structs import replace

from k2dist.errors import UnavailableError
from k2dist.messages import ChatMessage, TokenLogprob, ToolCall
from k2dist.service.answer_events import Accepted, AnswerEvent, Delta, Failed, Finished, PromptLogprobs


class WholeAnswer:
    """`add` takes a request's events in order and passes over other outputs than `output_index`.

    `prompt_logprobs` are those of prompt tokens 1 and up, if they were asked for.
    """

    def __init__(self, output_index: int = 0) -> None:
        self.output_index = output_index
        self.accepted: Accepted | None = None
        self.finished: Finished | None = None
        self.text = ""
        self.token_ids: list[int] = []
        self.tool_calls: list[ToolCall] = []
        self.logprobs: list[TokenLogprob] = []  # one per token, if asked for
        self.prompt_logprobs: list[TokenLogprob] = []

    def add(self, event: AnswerEvent) -> None:
        """UnavailableError if the output has failed, with the server's words."""
        if isinstance(event, Accepted):
            self.accepted = event
        elif isinstance(event, PromptLogprobs):
            self.prompt_logprobs += event.logprobs
        elif event.output_index != self.output_index:
            return
        elif isinstance(event, Delta):
            self._extend(event)
        elif isinstance(event, Finished):
            self.finished = event
        elif isinstance(event, Failed):
            raise UnavailableError(f"the answer broke off: {event.message}")

    def message(self) -> ChatMessage:
        """The assistant's turn, for the next request of the conversation."""
        return ChatMessage(role="assistant", content=self.text, tool_calls=tuple(self.tool_calls))

    def _extend(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        for more in delta.tool_calls:
            if more.index == len(self.tool_calls):
                self.tool_calls.append(ToolCall(id=more.id or "", name=more.name or "", arguments=""))
            call = self.tool_calls[more.index]
            self.tool_calls[more.index] = replace(call, arguments=f"{call.arguments}{more.arguments}")
