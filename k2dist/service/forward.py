"""Calls for requests that another coordinator has: passed on as they are, with their caller's key.

    client ── any coordinator ── home_of(request_id) ── the one that has it       one hop, never two

Every coordinator asks its caller for a key by itself, so a forwarded call can do no more than a direct one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc

from k2dist._proto.v1 import inference_pb2_grpc
from k2dist.coordinator import home_of
from k2dist.errors import UnavailableError
from k2dist.service.error_codes import DETAILS_KEY
from k2dist.service.tls import ClientTls, open_channel

_HOP = "k2dist-forwarded"
# Who calls, and to which trace it belongs (W3C).
_PASSED_ON = frozenset(("authorization", "x-api-key", "traceparent", "tracestate"))
Context = grpc.aio.ServicerContext[Any, Any]


class Peer(NamedTuple):
    """Another coordinator, for one call."""

    address: str
    stub: Any  # InferenceStub; untyped, because it is called with messages of any method
    metadata: tuple[tuple[str, str], ...]


class Forwarder:
    """One coordinator's view of all of them; alone until `join`. `home`: its own number."""

    def __init__(self, tls: ClientTls | None = None) -> None:
        self.home = 0
        self._tls = tls
        self._addresses: tuple[str, ...] = ("",)
        self._channels: dict[int, grpc.aio.Channel] = {}

    def join(self, home: int, addresses: Sequence[str]) -> None:
        """`addresses[i]`: of coordinator i, this one's own included. Once, before requests are drawn ids."""
        self.home = home
        self._addresses = tuple(addresses)

    def peer(self, request_id: str, context: Context) -> Peer | None:
        """Who has this request; None: it belongs here. UnavailableError: it was sent here by another's
        mistake."""
        home = home_of(request_id, len(self._addresses))
        if home == self.home:
            return None
        pairs = tuple((key, value) for key, value in context.invocation_metadata() or ())
        if any(key == _HOP for key, _ in pairs):
            raise UnavailableError(
                f"coordinators disagree about who has {request_id!r}: {home} of {len(self._addresses)} here; "
                "are they being replaced? Try again later"
            )
        passed_on = tuple((key, str(value)) for key, value in pairs if key in _PASSED_ON)
        stub = inference_pb2_grpc.InferenceStub(self._channel(home))
        return Peer(self._addresses[home], stub, (*passed_on, (_HOP, "1")))

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(grace=None)

    def _channel(self, home: int) -> grpc.aio.Channel:
        if home not in self._channels:
            self._channels[home] = open_channel(self._addresses[home], self._tls)
        return self._channels[home]


async def forward_stream(peer: Peer, method: str, request: Any, context: Context) -> None:
    """Write what the peer's stream says. It ends with this call, however that ends."""
    call = getattr(peer.stub, method)(request, timeout=context.time_remaining(), metadata=peer.metadata)
    try:
        async for message in call:
            await context.write(message)
    except grpc.aio.AioRpcError as error:
        await _pass_on(error, peer, context)
    finally:
        call.cancel()  # without effect on a call that is done


async def forward_call(peer: Peer, method: str, request: Any, context: Context) -> Any:
    try:
        return await getattr(peer.stub, method)(
            request, timeout=context.time_remaining(), metadata=peer.metadata
        )
    except grpc.aio.AioRpcError as error:
        await _pass_on(error, peer, context)


async def _pass_on(error: grpc.aio.AioRpcError, peer: Peer, context: Context) -> None:
    """The peer's status as ours. UnavailableError: it did not answer."""
    metadata: Any = error.trailing_metadata()
    if error.code() is grpc.StatusCode.UNAVAILABLE and DETAILS_KEY not in metadata:
        raise UnavailableError(
            f"the coordinator at {peer.address}, which has this request, does not answer; try again later"
        ) from error
    details = ((DETAILS_KEY, metadata[DETAILS_KEY]),) if DETAILS_KEY in metadata else ()
    await context.abort(error.code(), error.details() or "", details)
