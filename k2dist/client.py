"""What a program needs to talk to a running cluster over gRPC: the clients, what they send, what they give.

    with Client("127.0.0.1:50051") as client:
        for event in client.chat([ChatMessage(role="user", content="Hello")]):
            ...

`AsyncClient` is the same for asyncio. `generate_lasting` reconnects and resumes: no token is lost or doubled.
"""

from k2dist.errors import K2Error
from k2dist.messages import ChatMessage, ToolCall
from k2dist.service.answer_events import Accepted, AnswerEnd, AnswerEvent, Delta, Failed, Finished
from k2dist.service.client import AsyncClient, Client
from k2dist.service.client_request import Chat, ClientRequest, PartialSampling, Position
from k2dist.service.tls import ClientTls
from k2dist.service.whole_answer import WholeAnswer

__all__ = [
    "Accepted",
    "AnswerEnd",
    "AnswerEvent",
    "AsyncClient",
    "Chat",
    "ChatMessage",
    "Client",
    "ClientRequest",
    "ClientTls",
    "Delta",
    "Failed",
    "Finished",
    "K2Error",
    "PartialSampling",
    "Position",
    "ToolCall",
    "WholeAnswer",
]
