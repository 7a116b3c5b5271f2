"""`k2dist bench`: what parts of the system cost on this machine."""

from __future__ import annotations

import typer

from k2dist.cli.bench_bits import bits
from k2dist.cli.bench_gateway import gateway
from k2dist.cli.bench_grammar import grammar
from k2dist.cli.bench_latency import latency
from k2dist.cli.bench_load import load
from k2dist.cli.bench_offline import offline
from k2dist.cli.bench_random_model import random_model
from k2dist.cli.bench_scheduler import scheduler
from k2dist.cli.bench_serve import serve

bench = typer.Typer(help="Measure parts of the system on this machine.", no_args_is_help=True)
bench.command()(scheduler)
bench.command()(offline)
bench.command()(bits)
bench.command()(grammar)
bench.command()(latency)
bench.command()(load)
bench.command()(serve)
bench.command()(gateway)
bench.command("random-model")(random_model)
