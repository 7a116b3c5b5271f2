"""A conversation for a checkpoint's own chat_template.jinja, and the prompt that comes of it as fragments.

Such a template writes one string, in which a special token of the template's and the same characters in a
message look alike. So whatever a client sent is marked before: a noncharacter stands after the first
character of each special name in it, and of what could become one at its end. What is whole afterwards is
the template's. It is given messages as OpenAI has them, and tools with keys sorted as Kimi's tokenizer does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from k2dist.errors import CheckpointError, RequestError
from k2dist.messages import ChatMessage
from k2dist.text.chat import Chat, check_partial
from k2dist.text.tokenizer import Fragment
from k2dist.text.tool_calls import normalise_ids

TEMPLATE_FILE = "chat_template.jinja"
_MARK = "\ufdd0"  # in client's text it is doubled
_END = "\ufdd0\ufdd2"  # where a partial message ends
_MARKS = re.compile(f"{_MARK}({_MARK}?)")


class OwnTemplate:
    """`specials`: all names that are one token."""

    def __init__(self, specials: Iterable[str]) -> None:
        names = sorted(specials, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, names)))
        self._beginnings = frozenset(name[:end] for name in names for end in range(1, len(name)))
        self._longest = max(map(len, names))

    def context(self, chat: Chat, *, add_generation_prompt: bool) -> dict[str, Any]:
        """What the template is rendered with, as JSON values. RequestError as `text.chat.render`."""
        if not chat.messages:
            raise RequestError("messages", "empty; send at least one message")
        if chat.is_partial:
            check_partial(chat.messages)
        messages = [self._marked(_message(message)) for message in normalise_ids(chat.messages)]
        if chat.is_partial:
            messages[-1]["content"] += _END
        return {
            "messages": messages,
            "tools": self._marked(_sorted(list(chat.tools))) or None,
            "add_generation_prompt": add_generation_prompt and not chat.is_partial,
        }

    def fragments(self, rendered: str, *, is_partial: bool) -> tuple[Fragment, ...]:
        """The prompt. CheckpointError: a partial message is not in it."""
        if is_partial:
            end = rendered.rfind(_END)
            if end < 0:
                raise CheckpointError(f"{TEMPLATE_FILE}: it leaves the last message out; partial needs it")
            rendered = rendered[:end]
        return tuple(self._split(rendered))

    def _split(self, rendered: str) -> Iterator[Fragment]:
        start = 0
        for special in self._specials.finditer(rendered):
            yield Fragment(_unmarked(rendered[start : special.start()]), is_control=False)
            yield Fragment(special[0], is_control=True)
            start = special.end()
        yield Fragment(_unmarked(rendered[start:]), is_control=False)

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._marked_text(value)
        if isinstance(value, list):
            return [self._marked(inner) for inner in value]
        if isinstance(value, dict):
            return {self._marked_text(key): self._marked(inner) for key, inner in value.items()}
        return value

    def _marked_text(self, text: str) -> str:
        text = text.replace(_MARK, _MARK + _MARK)
        text = self._specials.sub(lambda name: name[0][:1] + _MARK + name[0][1:], text)
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:  # what follows in the prompt could complete it
                return text[:-length] + text[-length] + _MARK + text[len(text) - length + 1 :]
        return text


def _unmarked(text: str) -> str:
    return _MARKS.sub(r"\1", text)


def _message(message: ChatMessage) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.name is not None:
        shown["name"] = message.name
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return shown


def _sorted(tools: list[Any]) -> list[Any]:
    value: list[Any] = json.loads(json.dumps(tools, sort_keys=True))
    return value
