"""What clients talk to: the coordinator with its gRPC server, and the client of it.

    grpc_server ── Generation (text, tool calls) ── Coordinator (queue, lanes, log) ── Lane ── cluster
    Client ── AsyncClient ── k2dist.v1.Inference

ClientRequest and AnswerEvent are the same on both sides; protobuf is only between them.
"""

from k2dist.service.answer_events import Accepted, AnswerEnd, AnswerEvent, Delta, Failed, Finished
from k2dist.service.client import AsyncClient, Client
from k2dist.service.client_request import Chat, ClientRequest, PartialSampling, Position
from k2dist.service.coordinator_actor import CoordinatorActor, CoordinatorStats
from k2dist.service.lane import Lane
from k2dist.service.whole_answer import WholeAnswer

__all__ = [
    "Accepted",
    "AnswerEnd",
    "AnswerEvent",
    "AsyncClient",
    "Chat",
    "Client",
    "ClientRequest",
    "CoordinatorActor",
    "CoordinatorStats",
    "Delta",
    "Failed",
    "Finished",
    "Lane",
    "PartialSampling",
    "Position",
    "WholeAnswer",
]
