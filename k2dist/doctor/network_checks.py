"""Which interfaces will be used, and how fast the links are. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from statistics import median

from k2dist.doctor.facts import Link, Nic, NodeFacts
from k2dist.doctor.finding import Finding, error, ok, warning
from k2dist.doctor.needs import Needs

NAMED_NICS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
UNEVEN = 2.0  # times the median: a link that much worse than most is not as it should be
EXCHANGES_S = 0.05  # of a step, in latency alone: then the network, and nothing else, sets the pace


def nic_findings(facts: NodeFacts, needs: Needs | None, *, is_alone: bool) -> Iterator[Finding]:
    """Of one node's choice of interface. `is_alone`: no other node takes part."""
    address = facts.node if needs is None or needs.address == "node" else needs.address
    chosen = next((nic for nic in facts.nics if address in nic.addresses), None)
    if chosen is None:
        yield error(
            "network",
            f"no interface there has {address} ({_listed(facts.nics)}), and ranks listen on it",
            "start its Ray with --node-ip-address and one of these; or set network.address: node",
            facts.node,
        )
    elif chosen.is_loopback and not is_alone:
        yield error(
            "network",
            f"ranks would listen on {address}, which other nodes cannot reach",
            "set network.address: node, and start Ray on the address that others reach",
            facts.node,
        )
    else:
        yield from _choice(facts, chosen, address, is_alone=is_alone)
    yield from _named(facts)
    if facts.gpus and not is_alone:
        yield _rdma(facts)


def _choice(facts: NodeFacts, chosen: Nic, address: str, *, is_alone: bool) -> Iterator[Finding]:
    what = f"ranks listen on {chosen.name} ({address}), mtu {chosen.mtu}{_speed(chosen)}"
    faster = [
        nic
        for nic in facts.nics
        if nic.is_up and nic.addresses and (nic.mbit_per_s or 0) > UNEVEN * (chosen.mbit_per_s or 0) > 0
    ]
    if not chosen.is_up:
        yield error("network", f"{what}, and it is down", "the machine's owner: bring it up", facts.node)
    elif faster and not is_alone:
        best = max(faster, key=lambda nic: nic.mbit_per_s or 0)
        yield warning(
            "network",
            f"{what}; {best.name} has{_speed(best).removeprefix(',')}",
            f"start its Ray with --node-ip-address {best.addresses[0]}, if all nodes reach each other there",
            facts.node,
        )
    else:
        yield ok("network", what, facts.node)


def _named(facts: NodeFacts) -> Iterator[Finding]:
    """Interfaces that variables name, against those that are there. NCCL: a prefix, "=" exact, "^" not."""
    for variable in NAMED_NICS:
        wanted = facts.settings.get(variable, "")
        if not wanted or wanted.startswith("^"):
            continue
        is_exact = variable.startswith("GLOO") or wanted.startswith("=")
        names = [name.partition(":")[0] for name in wanted.lstrip("=").split(",")]
        there = [nic.name for nic in facts.nics]
        if not any(has == name or (not is_exact and has.startswith(name)) for has in there for name in names):
            remedy = "correct it where Ray is started there, or unset it"
            what = f"{variable}={wanted}, and there is no such interface ({', '.join(there)})"
            yield error("network", what, remedy, facts.node)


def _rdma(facts: NodeFacts) -> Finding:
    active = [port for port in facts.rdma if port.state == "ACTIVE"]
    is_off = facts.settings.get("NCCL_IB_DISABLE") == "1"
    if active and not is_off:
        return ok("rdma", f"{len(active)} of {len(facts.rdma)} ports active, {active[0].rate}", facts.node)
    if is_off:
        what, remedy = "NCCL_IB_DISABLE=1", "unset it, unless RDMA is known not to work there"
    elif facts.rdma:
        what, remedy = f"{len(facts.rdma)} ports, none active", "the network's owner: check cables and fabric"
    else:
        what, remedy = "no RDMA device", "give the container its devices (rdma/* resources), if there are any"
    return warning("rdma", f"{what}: NCCL falls back to TCP", remedy, facts.node)


def mtu_findings(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Nodes that meet must agree, or large packets are lost on the way, and only large ones."""
    by_mtu: dict[int, str] = {}
    for facts in nodes:
        for nic in facts.nics:
            if facts.node in nic.addresses and not nic.is_loopback:
                by_mtu.setdefault(nic.mtu, facts.node)
    if len(by_mtu) > 1:
        what = " and ".join(f"mtu {mtu} on {node}" for mtu, node in sorted(by_mtu.items()))
        yield warning("network", what, "the network's owner: set one mtu on all of them, and on switches")


def link_findings(links: Sequence[Link], needs: Needs | None) -> Iterator[Finding]:
    """Of every pair, and of all together, each against the median of its transport."""
    for transport in sorted({link.transport for link in links}):
        of_it = [link for link in links if link.transport == transport]
        pairs = [link for link in of_it if len(link.nodes) == 2]
        latencies = [link.latency_s for link in pairs if link.latency_s is not None]
        rates = [link.bytes_per_s for link in pairs if link.bytes_per_s is not None]
        for link in of_it:
            yield _link(
                link,
                median(latencies) if latencies else None,
                median(rates) if rates else None,
                0 if needs is None else needs.num_exchanges,
            )


def _link(link: Link, usual_latency_s: float | None, usual_rate: float | None, num_exchanges: int) -> Finding:
    where = _between(link.nodes)
    check = f"link {link.transport}"
    if link.latency_s is None or link.bytes_per_s is None:
        remedy = "see that nothing (a firewall, a NetworkPolicy) blocks TCP between them, on any port"
        return error(check, f"{where}: {link.reason}", remedy)
    what = f"{where}: {link.latency_s * 1e3:.2f} ms, {link.bytes_per_s / 1e9:.2f} GB/s from each"
    is_pair = len(link.nodes) == 2
    if is_pair and usual_latency_s is not None and link.latency_s > UNEVEN * usual_latency_s + 1e-3:
        return warning(check, f"{what}; others take {usual_latency_s * 1e3:.2f} ms", _UNEVEN_REMEDY)
    if is_pair and usual_rate is not None and link.bytes_per_s < usual_rate / UNEVEN:
        return warning(check, f"{what}; others do {usual_rate / 1e9:.2f} GB/s", _UNEVEN_REMEDY)
    step_s = link.latency_s * num_exchanges
    if step_s > EXCHANGES_S:
        return warning(
            check,
            f"{what}; a step has {num_exchanges} exchanges, so {step_s * 1e3:,.0f} ms of every token are "
            f"latency",
            "put the nodes into one rack or placement group, or use a faster interface",
        )
    return ok(check, what)


_UNEVEN_REMEDY = "the network's owner: another route, a slower port, or something else that uses it?"


def _between(nodes: tuple[str, ...]) -> str:
    if len(nodes) > 2:
        return f"all {len(nodes)} nodes at once"
    if nodes[0] == nodes[1]:
        return f"two on {nodes[0]}"
    return f"{nodes[0]} and {nodes[1]}"


def _listed(nics: Sequence[Nic]) -> str:
    """Addresses of version 4 where there are any: what `--node-ip-address` takes."""
    shown = [f"{nic.name} {a}" for nic in nics for a in nic.addresses if ip_address(a).version == 4]
    return ", ".join(shown) or "none has an address"


def _speed(nic: Nic) -> str:
    return "" if nic.mbit_per_s is None else f", {nic.mbit_per_s / 1000:g} Gbit/s"
