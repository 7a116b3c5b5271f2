"""One table from k2dist's errors to what clients see, read in both directions.

    K2Error class -> gRPC code, reason (ErrorInfo.reason, Error.reason in inference.proto)

A status carries google.rpc.Status in its trailing metadata: one ErrorInfo, a BadRequest naming the field when
a request is at fault, and a RetryInfo when to send it again can help (AIP-193).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, NoReturn

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from k2dist.coordinator.cluster_feed import CompactedError
from k2dist.errors import (
    CapacityError,
    CheckpointError,
    FencedError,
    K2Error,
    LayoutError,
    PeerError,
    RequestError,
    UnavailableError,
    UsageError,
)

DOMAIN = "k2dist"
DETAILS_KEY = "grpc-status-details-bin"
RETRY_AFTER_S = 1.0  # where nothing says when there will be room again


class RequestIdInUseError(RequestError):
    """The client chose a request_id that belongs to another request."""


class UnknownRequestError(RequestError):
    """No such request is known: never accepted here, or forgotten after its retention time."""


class AbortedError(K2Error):
    """The request was aborted before a lane had it."""


class UnauthenticatedError(K2Error):
    """No API key, or one that is not known."""


class ForbiddenError(K2Error):
    """The API key is known, and not for this."""


class RateLimitError(K2Error):
    """The API key has used up what it may have in a minute."""

    retry_can_help = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class Row(NamedTuple):
    error: type[K2Error]
    code: grpc.StatusCode
    reason: str


# The first row whose class matches counts, so subclasses stand before their bases.
TABLE: tuple[Row, ...] = (
    Row(RequestIdInUseError, grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE"),
    Row(UnknownRequestError, grpc.StatusCode.NOT_FOUND, "REQUEST_UNKNOWN"),
    Row(CompactedError, grpc.StatusCode.OUT_OF_RANGE, "STREAM_COMPACTED"),
    Row(RequestError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    Row(AbortedError, grpc.StatusCode.CANCELLED, "ABORTED"),
    Row(UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    Row(ForbiddenError, grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN"),
    Row(RateLimitError, grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED"),
    Row(LayoutError, grpc.StatusCode.INVALID_ARGUMENT, "LAYOUT_ILLEGAL"),
    Row(UsageError, grpc.StatusCode.FAILED_PRECONDITION, "MISCONFIGURED"),
    Row(CheckpointError, grpc.StatusCode.FAILED_PRECONDITION, "CHECKPOINT_INVALID"),
    Row(CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_CAPACITY"),
    Row(PeerError, grpc.StatusCode.UNAVAILABLE, "RANK_LOST"),
    Row(FencedError, grpc.StatusCode.UNAVAILABLE, "GENERATION_ENDED"),
    Row(UnavailableError, grpc.StatusCode.UNAVAILABLE, "NOT_SERVING"),
    Row(K2Error, grpc.StatusCode.INTERNAL, "INTERNAL"),
)


def row_of(error: K2Error) -> Row:
    return next(row for row in TABLE if isinstance(error, row.error))


def status_details(error: K2Error) -> bytes:
    """The google.rpc.Status of `error`, for the trailing metadata key `grpc-status-details-bin`."""
    row = row_of(error)
    status = status_pb2.Status(code=row.code.value[0], message=str(error))
    info = error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN)
    status.details.add().Pack(info)
    if isinstance(error, RequestError) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_can_help:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(1000 * retry_after_s(error)))
        status.details.add().Pack(retry)
    return bytes(status.SerializeToString())


def retry_after_s(error: K2Error) -> float:
    """When to send a request again that was refused for now."""
    return error.retry_after_s if isinstance(error, RateLimitError) else RETRY_AFTER_S


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: K2Error) -> NoReturn:
    """End a call with the status of `error`."""
    await context.abort(row_of(error).code, str(error), ((DETAILS_KEY, status_details(error)),))
    raise AssertionError("abort raises")


@asynccontextmanager
async def statuses(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Turns a K2Error, which can only come before the first event, into a status with details."""
    try:
        yield
    except K2Error as error:
        await abort(context, error)


def error_of(call: grpc.aio.AioRpcError, address: str) -> K2Error:
    """The error that a status from the server at `address` stands for."""
    code, message = call.code(), call.details() or ""
    info, field, wait_s = _details(call)
    row = next((row for row in TABLE if info is not None and row.reason == info.reason), None)
    if row is not None and row.error is RateLimitError:
        return RateLimitError(message, wait_s)
    if row is not None:
        return make_error(row.error, message, field)
    if code is grpc.StatusCode.UNAVAILABLE:
        is_there = "Socket closed" in message  # after a connection: a handshake that one side left
        doubt = "does it speak TLS, or ask for a certificate?" if is_there else "is it running?"
        return UnavailableError(f"{address}: no k2dist server answers ({message}); {doubt}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return PeerError(f"{address}: no answer within the deadline")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return UsageError(f"{address}: not a k2dist server, or another version ({message})")
    return K2Error(f"{address}: {code.name}: {message}")


def make_error(kind: type[K2Error], message: str, field: str = "") -> K2Error:
    """An error of class `kind` whose text is `message`, which already names `field`."""
    if not issubclass(kind, RequestError):
        return kind(message)
    return kind(field, message.removeprefix(f"{field}: "))


def _details(call: grpc.aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo | None, str, float]:
    """ErrorInfo of our domain, the field at fault, and after how many seconds to ask again."""
    status = status_pb2.Status()
    info: error_details_pb2.ErrorInfo | None = None
    field, wait_s = "", RETRY_AFTER_S
    metadata: Any = call.trailing_metadata()  # grpc.aio.Metadata; the stubs say otherwise
    if DETAILS_KEY in metadata:
        status.ParseFromString(metadata[DETAILS_KEY])
    for detail in status.details:
        candidate = error_details_pb2.ErrorInfo()
        violations = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(candidate) and candidate.domain == DOMAIN:
            info = candidate
        elif detail.Unpack(violations) and violations.field_violations:
            field = violations.field_violations[0].field
        elif detail.Unpack(retry):
            wait_s = retry.retry_delay.ToMilliseconds() / 1000
    return info, field, wait_s
