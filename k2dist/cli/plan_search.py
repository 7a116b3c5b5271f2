"""`k2dist plan --search`: which layout of some machines gives most, and its config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import typer

from k2dist.config import Architecture
from k2dist.errors import UsageError
from k2dist.planner import Assumptions, Workload
from k2dist.planner.devices import DEVICES
from k2dist.planner.search import Found, Hardware, config_lines, search

_SHOWN = 12  # layouts; the rest differ in little


def search_layouts(
    architecture: Architecture,
    hardware: str | None,
    nodes: int,
    gpus: int | None,
    workload: Workload,
    assumed: Assumptions,
    write: Path | None,
    *,
    as_json: bool,
) -> None:
    """Print the ranking, and write the best one's config."""
    names = [name for name in DEVICES if name != "cpu"]
    if hardware not in names:
        raise UsageError(f"--hardware {hardware}: name the devices, one of {', '.join(names)}")
    device = DEVICES[hardware]
    machines = Hardware(device=device, nodes=nodes, gpus=gpus or device.node_devices)
    found = search(architecture, machines, workload, assumed)
    if write is not None:
        if write.exists():
            raise UsageError(f"--write {write}: it exists; give another name")
        write.write_text("\n".join(config_lines(found[0], workload)) + "\n", encoding="utf-8")
    typer.echo(msgspec.json.encode(found).decode() if as_json else "\n".join(_lines(found, workload, write)))


def _lines(found: Sequence[Found], workload: Workload, write: Path | None) -> Iterator[str]:
    yield (
        f"{len(found)} layouts that fit, for prompts of {workload.prompt_len:,} and outputs of "
        f"{workload.output_len:,} tokens; estimates, nothing is measured"
    )
    yield (
        " nodes  lanes x tp  copies  exchange  tokens a lane   at once  tokens/s  a GPU  token ms  first ms  "
        "nodes to lose  binds"
    )
    for one in found[:_SHOWN]:
        yield _line(one)
    if len(found) > _SHOWN:
        yield f" ... and {len(found) - _SHOWN} more (--json has all)"
    if write is not None:
        yield f"wrote the first to {write}; `k2dist plan {write}` says more of it"


def _line(one: Found) -> str:
    config, serving = one.config, one.serving
    parallel = config.parallel
    exchange = "exact" if config.capacity_factor is None else f"{config.capacity_factor:g}"
    return (
        f"{config.nodes.num_nodes:6} {parallel.lanes:6} x {parallel.tp:<3} {one.copies:7} {exchange:>9} "
        f"{one.tokens_per_lane:14,} {serving.concurrency:9,} {serving.output_tokens_per_s:9,.0f} "
        f"{serving.output_tokens_per_s / parallel.world_size:6,.0f} {1e3 * serving.tpot_s:9.1f} "
        f"{1e3 * serving.ttft_s:9,.0f} {one.nodes_in_memory:14}  {serving.binding}"
    )
