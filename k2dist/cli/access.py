"""How commands that talk to a running cluster know it, and show who they are: the same options for all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k2dist.cli.environment import API_KEY, api_key
from k2dist.errors import UsageError
from k2dist.messages import Message
from k2dist.service.api_keys import check_key, read_key_file
from k2dist.service.tls import SYSTEM, ClientTls

CaOption = Annotated[
    str | None,
    typer.Option(help=f"PEM file of the CA that signed the server's certificate, or '{SYSTEM}': TLS."),
]
CertOption = Annotated[Path | None, typer.Option(help="PEM certificate to show, where mTLS is asked for.")]
KeyOption = Annotated[Path | None, typer.Option(help="PEM private key of --cert.")]
KeyFileOption = Annotated[
    Path | None, typer.Option(help=f"File that holds the API key; default: the variable {API_KEY}.")
]


class Access(Message, frozen=True, kw_only=True):
    tls: ClientTls | None = None
    api_key: str = ""


def read_access(
    ca: str | None = None, cert: Path | None = None, key: Path | None = None, key_file: Path | None = None
) -> Access:
    """What the options and the environment say. UsageError: they do not fit together."""
    if ca is None and (cert is not None or key is not None):
        raise UsageError("--cert and --key: they are for TLS; say with --ca whose certificates to trust")
    tls = None
    if ca is not None:
        tls = ClientTls(
            ca=ca, cert=None if cert is None else str(cert), key=None if key is None else str(key)
        )
    key_text = read_key_file(key_file) if key_file is not None else check_key(api_key() or "", API_KEY)
    return Access(tls=tls, api_key=key_text)
