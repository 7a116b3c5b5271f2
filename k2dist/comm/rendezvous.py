"""Where the ranks of one generation find each other: a small key-value store, by address and port.

Whoever watches over the ranks hosts it, afresh for each generation; ranks join it. Addresses come from the
configuration; nothing here asks for the machine's name.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # not in the stubs

from k2dist.errors import CapacityError, PeerError


def host_store(address: str, port: int = 0) -> TCPStore:
    """Serve a store on `address` only; port 0 takes a free one (`store.port`). It ends with the object.

    Errors: CapacityError if the address or port cannot be had.
    """
    try:
        listener = socket.create_server((address, port), family=_family(address), backlog=4096)
    except OSError as error:
        raise CapacityError(
            f"rendezvous at {address} port {port}: {error.strerror}; choose another"
        ) from error
    bound = int(listener.getsockname()[1])
    # The store owns the descriptor from here on. Left to itself it would listen on every address.
    return TCPStore(
        address, bound, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def join_store(address: str, port: int, deadline_s: float) -> TCPStore:
    """Connect to a hosted store. Errors: PeerError if it does not answer within `deadline_s` seconds."""
    try:
        return TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=deadline_s)
        )
    except DistError as error:
        raise PeerError(
            f"the rendezvous at {address} port {port} did not answer within {deadline_s:g} s"
        ) from error


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
