"""What clients talk to: the coordinator with its gRPC server, the client of it, the HTTP gateway before it.

    grpc_server ── Generation (text, tool calls) ── Coordinator (queue, lanes, log) ── Lane ── cluster
    Client ── AsyncClient ── k2dist.v1.Inference
    http_server ── http_app ── openai_*, anthropic_* (pure) ── http_exchange ── AsyncClient

ClientRequest and AnswerEvent are the same on both sides; protobuf is only between them.
"""

from k2dist.service.answer_events import Accepted, AnswerEnd, AnswerEvent, Delta, Failed, Finished
from k2dist.service.client import AsyncClient, Client
from k2dist.service.client_request import Chat, ClientRequest, PartialSampling, Position
from k2dist.service.coordinator_actor import CoordinatorActor, CoordinatorStats
from k2dist.service.gateway_actor import GatewayActor
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
    "GatewayActor",
    "Lane",
    "PartialSampling",
    "Position",
    "WholeAnswer",
]
