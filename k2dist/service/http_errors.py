"""One table from k2dist's errors to HTTP statuses, and their bodies in OpenAI's and in Anthropic's form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from k2dist.errors import CapacityError, FencedError, K2Error, PeerError, RequestError, UnavailableError
from k2dist.service.error_codes import (
    AbortedError,
    ForbiddenError,
    RateLimitError,
    RequestIdInUseError,
    UnauthenticatedError,
    UnknownRequestError,
    retry_after_s,
)


class UnknownModelError(RequestError):
    """A model that is not served here."""


class BodyTooLargeError(RequestError):
    """More bytes than one request may have."""


class HttpError(K2Error):
    """No such path, or no such method there."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message

    def __str__(self) -> str:
        return self.message


class Row(NamedTuple):
    error: type[K2Error]
    status: int
    openai_type: str
    openai_code: str | None
    anthropic_status: int
    anthropic_type: str


# The first row whose class matches counts.
TABLE: tuple[Row, ...] = (
    Row(UnknownModelError, 404, "invalid_request_error", "model_not_found", 404, "not_found_error"),
    Row(UnknownRequestError, 404, "invalid_request_error", "request_unknown", 404, "not_found_error"),
    Row(RequestIdInUseError, 409, "invalid_request_error", "request_id_in_use", 409, "invalid_request_error"),
    Row(BodyTooLargeError, 413, "invalid_request_error", "request_too_large", 413, "request_too_large"),
    Row(RequestError, 400, "invalid_request_error", None, 400, "invalid_request_error"),
    Row(AbortedError, 409, "invalid_request_error", "aborted", 409, "invalid_request_error"),
    Row(UnauthenticatedError, 401, "invalid_request_error", "invalid_api_key", 401, "authentication_error"),
    Row(ForbiddenError, 403, "invalid_request_error", "forbidden", 403, "permission_error"),
    Row(RateLimitError, 429, "rate_limit_error", "rate_limit_exceeded", 429, "rate_limit_error"),
    Row(CapacityError, 503, "server_error", "no_capacity", 529, "overloaded_error"),
    Row(PeerError, 503, "server_error", "rank_lost", 503, "api_error"),
    Row(FencedError, 503, "server_error", "generation_ended", 503, "api_error"),
    Row(UnavailableError, 503, "server_error", "not_serving", 503, "api_error"),
    Row(K2Error, 500, "server_error", "internal", 500, "api_error"),
)


class ErrorReply(NamedTuple):
    status: int
    body: dict[str, Any]
    retry_after_s: int | None  # None: to send it again as it is does not help

    @property
    def headers(self) -> dict[str, str]:
        named = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return named | ({"www-authenticate": "Bearer"} if self.status == 401 else {})  # RFC 9110, 15.5.2


ErrorForm = Callable[[K2Error, str], ErrorReply]  # the error, the request's id


def openai_error(error: K2Error, request_id: str) -> ErrorReply:
    """The id is in the headers of this API's responses only."""
    row = _row(error)
    param = error.field or None if isinstance(error, RequestError) else None
    body = {"message": str(error), "type": row.openai_type, "param": param, "code": row.openai_code}
    return ErrorReply(row.status, {"error": body}, _wait_s(error))


def anthropic_error(error: K2Error, request_id: str) -> ErrorReply:
    row = _row(error)
    body = {
        "type": "error",
        "error": {"type": row.anthropic_type, "message": str(error)},
        "request_id": request_id,
    }
    return ErrorReply(row.anthropic_status, body, _wait_s(error))


def rename_field(error: K2Error, names: dict[str, str]) -> K2Error:
    """The coordinator's refusal with the field as an HTTP client spelled it; `names`: ours to theirs.

    Numbers of sampling stand at the top of an HTTP body, and so do messages and tools.
    """
    if not isinstance(error, RequestError):
        return error
    field = error.field.removeprefix("sampling.").removeprefix("chat.")
    if field == "model":
        return UnknownModelError(field, error.message)
    for ours, theirs in names.items():
        if field == ours or field.startswith((f"{ours}[", f"{ours}.")):
            field = theirs + field.removeprefix(ours)
            break
    return type(error)(field, error.message)


def _wait_s(error: K2Error) -> int | None:
    """In whole seconds, as the header has them."""
    return math.ceil(retry_after_s(error)) if error.retry_can_help else None


def _row(error: K2Error) -> Row:
    if isinstance(error, HttpError):
        kind = "not_found_error" if error.status == 404 else "invalid_request_error"
        return Row(HttpError, error.status, "invalid_request_error", None, error.status, kind)
    return next(row for row in TABLE if isinstance(error, row.error))
