"""The part of `k2dist doctor` that `serve` runs before it loads anything: what takes seconds, not minutes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from k2dist.cluster.world import World
from k2dist.config import read_architecture
from k2dist.config.cluster import listen_addresses
from k2dist.doctor import ClusterFacts, Needs, diagnose, errors_of, needs_of, warnings_of
from k2dist.doctor.facts import Port
from k2dist.errors import CapacityError
from k2dist.probe import Wanted, gather, gather_here


def examine(world: World, tell: Callable[[str], None], *, joins_ray: bool) -> None:
    """Look at every node that Ray has, or at this machine, whose Ray is k2dist's own; `tell` warnings.

    Errors: CapacityError with a line for each finding that is one.
    """
    facts = gather_facts(world, joins_ray=joins_ray, is_quick=True)
    findings = diagnose(facts, needs_of_world(world, joins_ray=joins_ray))
    for finding in warnings_of(findings):
        tell(f"warning: {finding}")
    errors = errors_of(findings)
    if errors:
        lines = [*map(str, errors), "`k2dist doctor` says more; --no-doctor starts nevertheless"]
        raise CapacityError("\n".join(lines))


def gather_facts(world: World | None, *, joins_ray: bool, is_quick: bool) -> ClusterFacts:
    """With the Ray that was joined, or without; `world`: whose model and ports are looked at. `is_quick`: no
    disk and no link is measured."""
    wanted = Wanted()
    if world is not None:
        ports = tuple(
            Port(field=f"service.{field}", address=address)
            for field, address in listen_addresses(world.config.service)
        )
        wanted = Wanted(model_dir=world.model_dir, measures_disk=not is_quick, ports=ports)
    return (gather if joins_ray else gather_here)(wanted, with_links=not is_quick)


def needs_of_world(world: World, *, joins_ray: bool) -> Needs:
    architecture = read_architecture(Path(world.model_dir))
    return needs_of(world.config, architecture, world.layout, joins_ray=joins_ray)
