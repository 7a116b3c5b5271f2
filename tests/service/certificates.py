"""Certificates of a made-up CA, written as files that a config can name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Pair:
    cert: str
    key: str


class Authority:
    """One CA with its certificates in `directory`. `ca`: its own."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._ca = trustme.CA()
        self._directory = directory
        self.ca = str(directory / f"{name}.pem")
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, *hosts: str) -> Pair:
        """`name`.pem and `name`.key, good for `hosts`, servers and clients; replaces those of before."""
        issued = self._ca.issue_cert(*hosts)
        pair = Pair(str(self._directory / f"{name}.pem"), str(self._directory / f"{name}.key"))
        issued.private_key_pem.write_to_path(pair.key)
        Path(pair.cert).write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return pair
