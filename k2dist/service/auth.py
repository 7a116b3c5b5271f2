"""Who calls, and what it may do: API keys for gRPC and HTTP alike.

    Authorization: Bearer KEY   x-api-key: KEY (Anthropic's)   gRPC metadata of the same names
        ── Gate.identify ──> Caller ── may(method) ── own ids, tenant, priority, rate

Without a file of keys everybody is ANYBODY, who may do all; then only this machine can reach the servers,
unless somebody has said --insecure.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from k2dist.coordinator import Account
from k2dist.messages import Message
from k2dist.service.api_keys import KeyTable, Role, read_keys
from k2dist.service.client_request import ClientRequest
from k2dist.service.error_codes import ForbiddenError, RateLimitError, UnauthenticatedError
from k2dist.service.watched import Watched

HEADERS = ("authorization", "x-api-key")
_BEARER = "bearer "
# Which callers a gRPC method is for. The first row whose prefix matches counts; an unknown method is
# nobody's.
_EVERYBODY: frozenset[Role] = frozenset(("client", "monitor", "operator"))
_METHODS: tuple[tuple[str, frozenset[Role] | None], ...] = (
    ("/grpc.health.v1.Health/", None),  # None: no key needed
    ("/grpc.reflection.", None),
    ("/k2dist.v1.Inference/ListModels", _EVERYBODY),
    ("/k2dist.v1.Inference/", frozenset(("client", "operator"))),
    ("/k2dist.v1.Control/GetTopology", _EVERYBODY),
    ("/k2dist.v1.Control/WatchCluster", _EVERYBODY),
    ("/k2dist.v1.Observe/GetState", frozenset(("monitor", "operator"))),  # tells of all tenants
    ("/k2dist.v1.Observe/GetTrace", _EVERYBODY),  # of its own requests
    ("/k2dist.v1.Control/Plan", _EVERYBODY),  # it computes and changes nothing
    ("/", frozenset(("operator",))),
)


class Caller(Message, frozen=True, kw_only=True):
    """Who asks. `key_id` is empty, and `tenant` is whatever the request says, where no keys are asked for."""

    key_id: str = ""
    tenant: str = ""
    role: Role = "operator"
    max_priority: int | None = None

    def check_role(self, *roles: Role) -> None:
        if self.role not in roles:
            wanted = " or ".join(f"{role}s" for role in roles)
            raise ForbiddenError(f"this key is for {self.role}s; it takes one for {wanted}")

    def own(self, asked: ClientRequest) -> ClientRequest:
        """The request with its caller's tenant. ForbiddenError: another's tenant, or too high a priority."""
        if self.max_priority is not None and asked.priority > self.max_priority:
            raise ForbiddenError(f"priority {asked.priority}: this key may have {self.max_priority} at most")
        if not self.key_id:
            return asked
        if asked.tenant not in ("", self.tenant):
            raise ForbiddenError(f"tenant {asked.tenant!r}: this key is of {self.tenant!r}; leave it out")
        return replace(asked, tenant=self.tenant)


ANYBODY = Caller()


class Gate:
    """Tells who calls, and keeps each key's account.

    keys_path: the file of keys; None: there are none. inner_key: of this cluster's own gateway, which looks
    at models and topology for health checks; what it forwards carries its client's key.
    """

    def __init__(
        self,
        keys_path: str | None,
        *,
        inner_key: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """ConfigError: the file cannot be read."""
        self._clock = clock
        self._inner_key = inner_key
        self._keys: Watched[KeyTable] | None = None
        if keys_path is not None:
            self._keys = Watched((keys_path,), lambda: read_keys(keys_path), clock=clock)
        self._accounts: dict[str, Account] = {}
        self._charged: KeyTable | None = None  # the table whose limits the accounts have

    def identify(self, headers: Mapping[str, str]) -> Caller:
        """`headers`: by lower-case name. UnauthenticatedError: no key, or none that is known."""
        if self._keys is None:
            return ANYBODY
        key = _credential(headers)
        if key is None:
            raise UnauthenticatedError(
                "no API key; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            )
        if self._inner_key and hmac.compare_digest(key.encode(), self._inner_key.encode()):
            return Caller(key_id="gateway", tenant="gateway", role="monitor", max_priority=0)
        entry = self._keys.current().find(key)
        if entry is None:
            raise UnauthenticatedError("this API key is not known here; it may have been withdrawn")
        return Caller(key_id=entry.id, tenant=entry.tenant, role=entry.role, max_priority=entry.max_priority)

    def check_method(self, method: str, headers: Mapping[str, str]) -> None:
        """UnauthenticatedError or ForbiddenError unless a caller with these headers may call the gRPC
        method."""
        roles = next(roles for prefix, roles in _METHODS if method.startswith(prefix))
        if roles is not None:
            self.identify(headers).check_role(*sorted(roles))

    def admit(self, caller: Caller) -> Account | None:
        """Count one request of the caller in; who pays its tokens. RateLimitError: too many, or too many
        tokens."""
        account = self._account(caller.key_id)
        wait_s = account.admit(self._clock()) if account is not None else 0.0
        if wait_s > 0.0:
            raise RateLimitError(
                f"this key's requests or tokens of a minute are used up; ask again in {wait_s:.1f} s", wait_s
            )
        return account

    def _account(self, key_id: str) -> Account | None:
        if self._keys is None:
            return None
        table, now_s = self._keys.current(), self._clock()
        if table is not self._charged:
            self._charged = table
            for known, account in tuple(self._accounts.items()):
                if known not in table.entries:
                    del self._accounts[known]
                else:
                    account.change(table.entries[known].limit, now_s)
        entry = table.entries.get(key_id)
        if entry is None:
            return None
        return self._accounts.setdefault(key_id, Account(entry.limit, now_s))


def headers_of(pairs: Iterable[tuple[str, Any]] | None) -> dict[str, str]:
    """What of gRPC metadata says who calls."""
    return {name: value for name, value in pairs or () if name in HEADERS and isinstance(value, str)}


def _credential(headers: Mapping[str, str]) -> str | None:
    authorization = headers.get("authorization", "")
    if authorization.lower().startswith(_BEARER):
        return authorization[len(_BEARER) :].strip()
    return headers.get("x-api-key")
