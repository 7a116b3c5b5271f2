"""TLS for both servers and their clients: certificates from files, read again when they change.

    service.tls.cert, .key     what the servers show: PEM, the chain with the leaf first; its plain key
    service.tls.client_ca      given: whoever connects must show a certificate that this CA has signed (mTLS)
    service.tls.ca, .name      by what the gateway, and other coordinators, know a coordinator's certificate

New connections get the new certificate within a second or two of its files' change; those that are open stay.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc

from k2dist.config.cluster import TlsConfig
from k2dist.errors import ConfigError
from k2dist.messages import Message
from k2dist.service.watched import Watched
from k2dist.service.wire_options import CHANNEL_OPTIONS

SYSTEM = "system"  # instead of a CA's file: those that this machine trusts


class ClientTls(Message, frozen=True, kw_only=True):
    """How a client knows its server, and shows who it is. Paths of PEM files."""

    ca: str  # who has signed the server's certificate; SYSTEM: a public CA
    cert: str | None = None  # with `key`: what the client shows where mTLS is asked for
    key: str | None = None
    name: str | None = None  # in the server's certificate; None: the host of its address


def server_credentials(config: TlsConfig) -> grpc.ServerCredentials:
    """For a gRPC server. ConfigError names the file at fault."""
    files = Watched(_paths(config), lambda: _grpc_configuration(config))
    return grpc.dynamic_ssl_server_credentials(
        files.current(), files.current, require_client_authentication=config.client_ca is not None
    )


def server_context(config: TlsConfig) -> ssl.SSLContext:
    """For an HTTP server. ConfigError names the file at fault."""
    context = _LiveContext(ssl.PROTOCOL_TLS_SERVER)
    context.files = Watched(_paths(config), lambda: _context(config))
    return context


def check_files(config: TlsConfig) -> None:
    """ConfigError unless a server could use them now."""
    if config.is_on:
        _grpc_configuration(config)


def client_context(tls: ClientTls) -> ssl.SSLContext:
    """For an HTTP client, whose URL names the host. ConfigError names the file at fault."""
    cas = None if tls.ca == SYSTEM else _read_cas("ca", tls.ca).decode("ascii", "replace")
    context = ssl.create_default_context(cadata=cas)  # a CA given: it alone is trusted
    pair = _own_pair(tls)
    if pair is not None:
        _load_pair(context, "", *pair)
    return context


def channel_credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    """For a gRPC client. ConfigError names the file at fault."""
    ca = None if tls.ca == SYSTEM else _read_cas("ca", tls.ca)
    pair = _own_pair(tls)
    if pair is None:
        return grpc.ssl_channel_credentials(ca)
    cert, key = pair
    _load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "", cert, key)
    return grpc.ssl_channel_credentials(ca, _read("key", key), _read("cert", cert))


def open_channel(address: str, tls: ClientTls | None) -> grpc.aio.Channel:
    """A connection to a k2dist server, in the clear without `tls`. ConfigError names the file at fault."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    names = () if tls.name is None else (("grpc.ssl_target_name_override", tls.name),)
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=(*CHANNEL_OPTIONS, *names))


def inner_tls(config: TlsConfig) -> ClientTls | None:
    """For the cluster's own clients of its coordinators; they show the servers' certificate."""
    if config.cert is None:
        return None
    assert config.ca is not None, "the config was checked"
    cert, key = (config.cert, config.key) if config.client_ca is not None else (None, None)
    return ClientTls(ca=config.ca, cert=cert, key=key, name=config.name)


def _own_pair(tls: ClientTls) -> tuple[str, str] | None:
    if tls.cert is not None and tls.key is not None:
        return tls.cert, tls.key
    if tls.cert is not tls.key:
        raise ConfigError("cert and key: a certificate and its key go together; give both")
    return None


class _LiveContext(ssl.SSLContext):
    """What asyncio is given once and asks for each connection: it hands on to the context of the day."""

    files: Watched[ssl.SSLContext]

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self.files.current().wrap_bio(*args, **kwargs)


def _paths(config: TlsConfig) -> list[str]:
    return [path for path in (config.cert, config.key, config.client_ca) if path is not None]


def _grpc_configuration(config: TlsConfig) -> grpc.ServerCertificateConfiguration:
    assert config.cert is not None
    assert config.key is not None
    _context(config)  # says what is wrong; gRPC only logs it
    pair = _read("service.tls.key", config.key), _read("service.tls.cert", config.cert)
    ca = None if config.client_ca is None else _read("service.tls.client_ca", config.client_ca)
    return grpc.ssl_server_certificate_configuration([pair], ca)


def _context(config: TlsConfig) -> ssl.SSLContext:
    assert config.cert is not None
    assert config.key is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, "service.tls.", config.cert, config.key)
    if config.client_ca is not None:
        text = _read_cas("service.tls.client_ca", config.client_ca).decode("ascii", "replace")
        context.load_verify_locations(cadata=text)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load_pair(context: ssl.SSLContext, source: str, cert: str, key: str) -> None:
    for field, path in ((f"{source}cert", cert), (f"{source}key", key)):
        _read(field, path)
    try:
        context.load_cert_chain(cert, key, password="")  # never a question on a terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{source}key={key!r}: is not the key of {source}cert={cert!r}") from error
        raise ConfigError(
            f"{source}cert={cert!r}, {source}key={key!r}: one of them is not PEM, or the key is encrypted "
            f"({error.reason or 'no reason given'}); give a chain with the leaf first, and a plain key"
        ) from error


def _read_cas(field: str, path: str) -> bytes:
    data = _read(field, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii", "replace"))
    except ssl.SSLError as error:
        raise ConfigError(f"{field}={path!r}: holds no certificates in PEM ({error.reason})") from error
    return data


def _read(field: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}={path!r}: cannot be read ({error.strerror})") from error
