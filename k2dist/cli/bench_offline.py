"""`k2dist bench offline`: prompt and decode speed of a model in this process, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from k2dist.cli.bar import bar
from k2dist.cli.shown import JsonOption, figures, print_report
from k2dist.demo import MODEL_DIR

if TYPE_CHECKING:
    from k2dist.bench.offline import OfflineReport


def offline(
    model: Annotated[Path, typer.Argument(help="Model directory; default: the demo's model.")] = MODEL_DIR,
    lanes: Annotated[int, typer.Option(help="Lanes; each is a batch of its own.")] = 1,
    tp: Annotated[int, typer.Option(help="Ranks per lane.")] = 1,
    kernels: Annotated[str, typer.Option(help="The kernel set, as in a cluster's config.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the residual stream: bfloat16 or float32.")] = "bfloat16",
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 128,
    decode_tokens: Annotated[
        int, typer.Option(help="Tokens of each sequence while it is timed.", min=1)
    ] = 32,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences at once; may be repeated. Default: 1, 8, 32.", min=1)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tokens per second, a step's time and what bounds it, and memory: of a model in this process."""
    from k2dist.bench.offline import measure  # with torch: not for others

    with bar("tokens", is_quiet=as_json) as show:
        report = measure(
            model,
            lanes=lanes,
            tp=tp,
            kernels=kernels,
            dtype=dtype,
            prompt_len=prompt_len,
            decode_tokens=decode_tokens,
            batches=(1, 8, 32) if batch is None else batch,
            show=show,
        )
    print_report("offline", report, _print, as_json=as_json)


def _print(report: OfflineReport, console: Console) -> None:
    titles = ("batch", "prompt/s", "decode/s", "step ms", "device", "host", "experts", "MB", "floor")
    table = figures(*titles, num_names=0, is_narrow=True)
    for cost in report.batches:
        table.add_row(
            f"{cost.batch:,}",
            f"{cost.prompt_tokens_per_s:,.0f}",
            f"{cost.decode_tokens_per_s:,.1f}",
            f"{cost.step_ms:.2f}",
            f"{cost.device_ms:.2f}",
            f"{cost.host_ms:.2f}",
            f"{cost.experts_touched:.1f}",
            f"{cost.floor_bytes / 1e6:,.1f}",
            f"{cost.floor_share:.1%}",
        )
    console.print(table)
    console.print(
        f"{report.kernels} kernels, {report.dtype}, {report.lanes} lanes of tp {report.tp}, "
        f"{report.num_threads} threads; prompts of {report.prompt_len}, then {report.decode_tokens} each\n"
        f"prompt/s, decode/s: tokens. step, device, host: ms of a decoding step.\n"
        f"experts: that such a step touches in a layer, from their shares of all rows (at batch 1 exactly).\n"
        f"MB: weights that it touches, as the checkpoint holds them. floor: the share of a step that\n"
        f"reading them once takes at {report.read_bytes_per_s / 1e9:.1f} GB/s, as measured just now.",
        soft_wrap=True,
    )
    console.print(
        f"memory: RSS {_mb(report.peak_rss_bytes)} at peak, {_mb(report.start_rss_bytes)} before the model; "
        f"PSS {_mb(report.pss_bytes)} with it\n"
        f"the peak adds {report.memory_ratio:.2f} times the checkpoint's {_mb(report.checkpoint_bytes)}",
        soft_wrap=True,
    )


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
