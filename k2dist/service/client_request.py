"""What a client asks for, in no API's words: gRPC now and HTTP later are translated into it."""

from __future__ import annotations

from k2dist.messages import Message
from k2dist.scheduler import PartialSampling
from k2dist.text.chat import Chat

__all__ = ["Chat", "ClientRequest", "PartialSampling", "Position"]


class ClientRequest(Message, frozen=True, kw_only=True):
    """One request for generation. `prompt`: text encoded as it is, token ids, or a conversation."""

    prompt: str | tuple[int, ...] | Chat
    sampling: PartialSampling = PartialSampling()
    request_id: str | None = None  # None: drawn by the server
    num_outputs: int = 1
    tenant: str = ""
    priority: int = 0
    timeout_s: float | None = None  # from its acceptance; outputs that still run then end. None: no limit
    detached: bool = False  # True: losing the stream does not end the request
    model: str = ""  # empty: the one that is served


class Position(Message, frozen=True, kw_only=True):
    """Where to read on in one output."""

    output_index: int
    token_index: int
