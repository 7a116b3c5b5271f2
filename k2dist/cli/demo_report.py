"""What a demo shows at its end: who answered what, how fast, and what ran where."""

from __future__ import annotations

from rich.console import Console

from k2dist.cli.shown import figures
from k2dist.cluster.status import ClusterStatus
from k2dist.cluster.world import World
from k2dist.messages import Message, RankStats, ToolCall
from k2dist.parallel import RankPlace


class TalkReport(Message, frozen=True, kw_only=True):
    """One conversation. Tokens and seconds are of all its answers, tool calls included."""

    name: str
    question: str
    answer: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    lane: int  # of the last answer
    num_prompt_tokens: int  # of the last answer
    num_tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.total_s


class RankReport(Message, frozen=True, kw_only=True):
    """One rank: its place, its process, and what it has done."""

    world_rank: int
    lane: int | None
    tp_rank: int | None
    experts: tuple[int, ...]  # of its first moe layer
    node: str
    pid: int
    num_bytes_loaded: int
    num_steps: int
    step_ms: float  # mean
    num_rows_sent: int  # token rows that went to experts of other ranks
    num_bytes_sent: int


class DemoReport(Message, frozen=True, kw_only=True):
    cluster: str
    address: str
    http: str  # of the gateway
    ready_s: float  # from the command to the first question
    total_s: float  # to the last answer
    talks: tuple[TalkReport, ...]
    ranks: tuple[RankReport, ...]
    is_left_running: bool


def rank_reports(world: World, status: ClusterStatus, stats: tuple[RankStats, ...]) -> tuple[RankReport, ...]:
    return tuple(_rank_report(place, status, stats[place.world_rank]) for place in world.layout.ranks)


def _rank_report(place: RankPlace, status: ClusterStatus, stats: RankStats) -> RankReport:
    rank = status.ranks[place.world_rank]
    return RankReport(
        world_rank=place.world_rank,
        lane=place.lane,
        tp_rank=place.tp_rank,
        experts=place.experts[0] if place.experts else (),
        node=rank.node,
        pid=rank.pid,
        num_bytes_loaded=rank.progress.num_bytes_loaded,
        num_steps=stats.num_steps,
        step_ms=1000 * stats.step_s_total / max(stats.num_steps, 1),
        num_rows_sent=stats.num_rows_sent,
        num_bytes_sent=stats.num_bytes_sent,
    )


def print_report(report: DemoReport, console: Console) -> None:
    """For people."""
    titles = ("rank", "lane", "tp", "experts", "pid", "shard", "steps", "ms/step", "rows to other ranks")
    ranks = figures(*titles, num_names=len(titles))
    for rank in report.ranks:
        ranks.add_row(
            str(rank.world_rank),
            "-" if rank.lane is None else str(rank.lane),
            "-" if rank.tp_rank is None else str(rank.tp_rank),
            _runs(rank.experts),
            str(rank.pid),
            f"{rank.num_bytes_loaded / 1e6:.1f} MB",
            str(rank.num_steps),
            f"{rank.step_ms:.1f}",
            f"{rank.num_rows_sent:,} ({rank.num_bytes_sent / 1e6:.1f} MB)",
        )
    talks = figures("question", "lane", "prompt", "tokens", "first token", "tokens/s")
    for talk in report.talks:
        talks.add_row(
            talk.question,
            str(talk.lane),
            str(talk.num_prompt_tokens),
            str(talk.num_tokens),
            f"{talk.first_token_s:.2f} s",
            f"{talk.tokens_per_s:.1f}",
        )
    num_rows = sum(rank.num_rows_sent for rank in report.ranks)
    console.print(ranks, talks)
    console.print(
        f"{num_rows:,} token rows dispatched between ranks; "
        f"ready after {report.ready_s:.1f} s, last answer after {report.total_s:.1f} s."
    )
    if report.is_left_running:
        clients = f", or OpenAI and Anthropic clients at http://{report.http}" if report.http else ""
        console.print(
            f"{report.cluster} serves at {report.address}: try `k2dist chat --address {report.address}`"
            f"{clients}; `k2dist stop --name {report.cluster}` ends it."
        )


def _runs(experts: tuple[int, ...]) -> str:
    """0-2, 5 of (0, 1, 2, 5)."""
    runs: list[list[int]] = []
    for expert in experts:
        if runs and runs[-1][-1] == expert - 1:
            runs[-1].append(expert)
        else:
            runs.append([expert])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
