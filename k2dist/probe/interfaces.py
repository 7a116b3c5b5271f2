"""Network interfaces and RDMA ports of this machine, as the kernel lists them."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from k2dist.doctor.facts import Nic, Rdma

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_RDMA = Path("/sys/class/infiniband")
_NO_SPEED = (0, 65535)  # what drivers say that have none


def find_nics() -> tuple[Nic, ...]:
    stats = psutil.net_if_stats()
    return tuple(
        Nic(
            name=name,
            addresses=tuple(each.address.partition("%")[0] for each in listed if each.family in _FAMILIES),
            is_up=name in stats and stats[name].isup,
            mtu=stats[name].mtu if name in stats else 0,
            mbit_per_s=_speed(stats[name].speed) if name in stats else None,
            is_loopback=name in stats and "loopback" in stats[name].flags,
        )
        for name, listed in sorted(psutil.net_if_addrs().items())
    )


def _speed(mbit_per_s: int) -> int | None:
    return None if mbit_per_s in _NO_SPEED or mbit_per_s < 0 else mbit_per_s


def find_rdma(root: Path = _RDMA) -> tuple[Rdma, ...]:
    """`<device>/ports/<number>/{state,rate}`, which say "4: ACTIVE" and "400 Gb/sec (4X NDR)"."""
    return tuple(
        Rdma(
            name=f"{port.parent.parent.name}/{port.name}",
            state=(port / "state").read_text().partition(":")[2].strip(),
            rate=(port / "rate").read_text().partition("(")[0].strip(),
        )
        for port in sorted(root.glob("*/ports/*"))
        if (port / "state").is_file() and (port / "rate").is_file()
    )
