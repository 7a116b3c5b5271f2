"""How gRPC connections are kept, and what may pass over them; the same numbers on both sides."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 16 * 2**20  # a prompt of 2**20 ids is 3 MiB; a conversation as text may be some more
_MAX_METADATA_BYTES = 16 * 1024
_PING_MS, _PONG_MS = 30_000, 10_000  # finds who vanished without a word
_MAX_CONNECTIONS = 4096  # of one server; each carries many calls
_HANDSHAKE_MS = 20_000
_IDLE_MS = 600_000  # a connection without calls; its client opens another when it has one

_BOTH = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", _PONG_MS),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_BOTH,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),  # a server that comes back is found again within this
)


def server_options(max_streams: int) -> tuple[tuple[str, int], ...]:
    """`max_streams`: of one connection; what is more waits in its client."""
    return (
        *_BOTH,
        ("grpc.so_reuseport", 0),  # else a second server on the port would bind in silence
        ("grpc.max_concurrent_streams", max_streams),
        ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # A long prompt leaves a stream silent; clients that ping meanwhile are not to be sent away for it.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
    )
