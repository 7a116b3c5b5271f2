"""How commands that talk to a running cluster know it, and show who they are: the same options for all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k2dist.cli.environment import API_KEY, api_key
from k2dist.errors import UsageError
from k2dist.messages import Message
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
    return Access(tls=tls, api_key=_read_key(key_file))


def _read_key(path: Path | None) -> str:
    if path is None:
        return _checked(api_key() or "", API_KEY)
    try:
        return _checked(path.read_text(encoding="utf-8"), f"--api-key-file {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path}: cannot be read ({error})") from error


def _checked(text: str, source: str) -> str:
    """Without the line end that files have. It goes into a header, which takes no other characters."""
    text = text.strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError(f"{source}: not an API key; give one line of printable ASCII")
    return text
