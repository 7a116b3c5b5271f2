"""`k2dist inspect`: what a layout makes each rank read, byte range by byte range, before anything is started.

Ranges are taken from the files of a model directory, if it has any, and else from the files that
`write_checkpoint` would write. No weight is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from k2dist.cli.shown import JsonOption, print_json
from k2dist.cli.trace import trace
from k2dist.config import KIMI_K2, Architecture, find_architecture
from k2dist.config.cluster import ParallelConfig
from k2dist.config.load import load_cluster
from k2dist.errors import UsageError
from k2dist.parallel import (
    FileMap,
    Layout,
    ShardPlan,
    StoredTensor,
    TensorRead,
    configured_layout,
    file_maps,
    shard_plans,
)

inspect = typer.Typer(
    help="Which bytes a layout reads, without starting it; what became of a request.",
    no_args_is_help=True,
)
inspect.command()(trace)

Config = Annotated[Path | None, typer.Argument(help="Cluster YAML; see cluster_configs/. Or give --lanes.")]
Model = Annotated[
    str | None, typer.Option(help=f"Model directory or name; default: the config's, else {KIMI_K2}.")
]


@inspect.command()
def shards(
    config: Config = None,
    lanes: Annotated[int | None, typer.Option(help="In place of a config.")] = None,
    tp: Annotated[int, typer.Option(help="Ranks of a lane; with --lanes.")] = 1,
    expert_only_ranks: Annotated[int, typer.Option(help="With --lanes.")] = 0,
    model: Model = None,
    rank: Annotated[int | None, typer.Option(help="Only this world rank, tensor by tensor.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Which tensors, files and bytes each rank reads, and what it skips."""
    if (config is None) == (lanes is None):
        raise UsageError("give a cluster YAML, or --lanes (and --tp)")
    if config is not None:
        cluster = load_cluster(config)
        parallel, model = cluster.parallel, model or cluster.model
    else:
        parallel = _parallel(lanes or 0, tp, expert_only_ranks)
    model = model or KIMI_K2
    architecture = find_architecture(model)
    layout = configured_layout(architecture, parallel)
    if rank is not None and not 0 <= rank < layout.world_size:
        raise UsageError(f"--rank {rank}: the layout has ranks 0 to {layout.world_size - 1}")
    plans = [plan for plan in shard_plans(architecture, layout) if rank is None or plan.world_rank == rank]
    files = _Files(model, architecture, plans)
    found = [_shard(plan, layout, files, is_detailed=rank is not None) for plan in plans]
    if as_json:
        shown = {"model": model, "files": files.source, "num_bytes": files.num_bytes, "ranks": found}
        print_json(shown)
    else:
        typer.echo("\n".join(_text(model, layout, files, found)))


def _parallel(lanes: int, tp: int, expert_only_ranks: int) -> ParallelConfig:
    values = {"lanes": lanes, "tp": tp, "expert_only_ranks": expert_only_ranks}
    try:
        return msgspec.convert(values, ParallelConfig)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"--lanes {lanes} --tp {tp} --expert-only-ranks {expert_only_ranks}: {error}"
        ) from error


# -- where bytes lie -----------------------------------------------------------------------------------


class _Files:
    """The files of a model, real ones where there are any; checked against `plans` then."""

    def __init__(self, model: str, architecture: Architecture, plans: list[ShardPlan]) -> None:
        found = _real_files(Path(model), plans)
        maps = list(file_maps(architecture)) if found is None else found
        self.source = "those k2dist would write" if found is None else f"those in {model}"
        self.num_bytes = sum(file.num_bytes for file in maps)
        self._place = {name: (file.name, stored) for file in maps for name, stored in file.tensors.items()}

    def place(self, name: str) -> tuple[str, StoredTensor]:
        """The file of a tensor, and where it lies in it."""
        return self._place[name]


def _real_files(model_dir: Path, plans: list[ShardPlan]) -> list[FileMap] | None:
    if not any(model_dir.glob("*.safetensors")):
        return None
    from k2dist.checkpoint import CheckpointFiles  # with torch: not where there is nothing to open

    with CheckpointFiles(model_dir) as files:
        for plan in plans:
            files.check(plan)
        return files.maps()


# -- what is said --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """One tensor of one rank: `num_runs` runs of `run_bytes`, `stride` apart, from byte `begin` of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int]
    file: str
    begin: int
    run_bytes: int
    stride: int
    num_runs: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """One rank's part. `reads` and names of skips only where a single rank is asked for."""

    world_rank: int
    lane: int | None
    tp_rank: int | None
    slots: int  # of one MoE layer, the fullest
    num_tensors: int
    num_bytes: int
    num_files: int
    skips: Mapping[str, int]  # by reason
    reads: tuple[_Read, ...] = ()


def _shard(plan: ShardPlan, layout: Layout, files: _Files, *, is_detailed: bool) -> _Shard:
    place = layout.place(plan.world_rank)
    return _Shard(
        world_rank=plan.world_rank,
        lane=place.lane,
        tp_rank=place.tp_rank,
        slots=max((len(experts) for experts in place.experts), default=0),
        num_tensors=len(plan.reads),
        num_bytes=plan.num_bytes,
        num_files=len({files.place(read.name)[0] for read in plan.reads}),
        skips=Counter(skip.reason for skip in plan.skips),
        reads=tuple(_read(read, files) for read in plan.reads) if is_detailed else (),
    )


def _read(read: TensorRead, files: _Files) -> _Read:
    file, stored = files.place(read.name)
    runs = read.runs
    return _Read(
        name=read.name,
        dtype=read.dtype,
        shape=read.shape,
        rows=(read.row_start, read.row_stop),
        columns=(read.col_start, read.col_stop),
        file=file,
        begin=stored.begin + runs.first,
        run_bytes=runs.run_bytes,
        stride=runs.stride,
        num_runs=runs.num_runs,
        num_bytes=read.num_bytes,
    )


def _text(model: str, layout: Layout, files: _Files, shards: list[_Shard]) -> Iterator[str]:
    yield f"{model}: {files.num_bytes:,} bytes in files, {files.source}"
    yield f"{layout.world_size} ranks, {layout.num_lanes} lanes x tp {layout.tp}"
    yield " rank  lane  tp rank  slots  tensors  files              bytes  skipped"
    for shard in shards:
        lane, tp_rank = ("-" if value is None else str(value) for value in (shard.lane, shard.tp_rank))
        skipped = "; ".join(f"{count:,} {reason}" for reason, count in shard.skips.items())
        yield (
            f"{shard.world_rank:5} {lane:>5} {tp_rank:>8} {shard.slots:6} {shard.num_tensors:8,} "
            f"{shard.num_files:6} {shard.num_bytes:18,}  {skipped}"
        )
        yield from (_line(read) for read in shard.reads)
    if len(shards) > 1:
        total = sum(shard.num_bytes for shard in shards)
        yield f"together {total:,} bytes, {total / files.num_bytes:.2f} times the files"


def _line(read: _Read) -> str:
    cut = f"[{read.rows[0]}:{read.rows[1]}"
    cut += "]" if len(read.shape) == 1 else f", {read.columns[0]}:{read.columns[1]}]"
    at = f"{read.file} {read.begin:,}"
    at += (
        f" + {read.num_bytes:,}"
        if read.num_runs == 1
        else (f" + {read.num_runs:,} x {read.run_bytes:,}, every {read.stride:,}")
    )
    return f"  {read.name} {read.dtype} {list(read.shape)} {cut} {at}"
