"""Text on both sides of the model: K2's tokenizer and chat template in, characters and tool calls out.

Pure: values in, values out. `Tokenizer.load` alone reads files.
"""

from k2dist.text.chat import DEFAULT_SYSTEM, Chat, ToolChoice, encode_chat, render, render_text
from k2dist.text.output import OutputReader
from k2dist.text.stream import Passed, Released, StopGate, StopStrings, Utf8Stream
from k2dist.text.tokenizer import Fragment, Tokenizer, end_token_ids
from k2dist.text.tool_calls import (
    Answer,
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    ContentDelta,
    Part,
    ToolCallParser,
    Tools,
    collect,
    normalise_ids,
)

__all__ = [
    "DEFAULT_SYSTEM",
    "Answer",
    "ArgumentsDelta",
    "CallEnded",
    "CallStarted",
    "Chat",
    "ContentDelta",
    "Fragment",
    "OutputReader",
    "Part",
    "Passed",
    "Released",
    "StopGate",
    "StopStrings",
    "Tokenizer",
    "ToolCallParser",
    "ToolChoice",
    "Tools",
    "Utf8Stream",
    "collect",
    "encode_chat",
    "end_token_ids",
    "normalise_ids",
    "render",
    "render_text",
]
