"""Ranks talk here: communicators (alone, threads, processes), the token exchange, the step's agreement."""

from k2dist.comm.agreement import StepAgreement, agree, combine
from k2dist.comm.alone import Alone
from k2dist.comm.communicator import Communicator
from k2dist.comm.distributed import DistCommunicator
from k2dist.comm.exchange import Dispatched, Exchange, Ticket, TokenExchange
from k2dist.comm.nccl import NcclCommunicator
from k2dist.comm.padded import PaddedExchange
from k2dist.comm.rehearsal import PeerRows, RehearsalCommunicator, RehearsalWorld
from k2dist.comm.rendezvous import host_store, join_store
from k2dist.comm.threads import ThreadCommunicator, thread_group, thread_world
from k2dist.parallel.capacity import Capacity, CapacityRule

__all__ = [
    "Alone",
    "Capacity",
    "CapacityRule",
    "Communicator",
    "Dispatched",
    "DistCommunicator",
    "Exchange",
    "NcclCommunicator",
    "PaddedExchange",
    "PeerRows",
    "RehearsalCommunicator",
    "RehearsalWorld",
    "StepAgreement",
    "ThreadCommunicator",
    "Ticket",
    "TokenExchange",
    "agree",
    "combine",
    "host_store",
    "join_store",
    "thread_group",
    "thread_world",
]
