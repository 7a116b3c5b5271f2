"""`k2dist generate`: many prompts through a model in this process, JSON lines out. No cluster is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from k2dist.demo import MODEL_DIR
from k2dist.errors import UsageError


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each one an argument.")] = None,
    file: Annotated[Path | None, typer.Option(help="Text file, one prompt a line; - is stdin.")] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines: {"prompt": text or ids} or {"messages": [...], "tools": [...]}; optional '
            '"sampling": {...} (over the options here) and "id". - is stdin.'
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: stdout.")] = None,
    model: Annotated[Path, typer.Option(help="Model directory; default: the demo's model.")] = MODEL_DIR,
    chat: Annotated[bool, typer.Option(help="Take each text as a user's message.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    n: Annotated[int, typer.Option(help="Outputs per prompt.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Default: the rest of the context.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends an output; may be repeated.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="Of each token, and so many likeliest.")] = None,
    more_sampling: Annotated[
        str | None,
        typer.Option(
            "--sampling",
            help='Any fields of SamplingParams as JSON, such as {"top_k": 20}; over the options here.',
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="All seeds are drawn from it; default: chance.")] = None,
    lanes: Annotated[int, typer.Option(help="Lanes; each is a batch of its own.")] = 1,
    tp: Annotated[int, typer.Option(help="Ranks per lane.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Answer prompts in this process; one JSON line for each, in their order.

    A prompt that cannot be answered gets a line with its error, and the exit code is 1.
    """
    given: dict[str, Any] = {
        "n": n,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "stop": tuple(stop or ()),
        "logprobs": logprobs,
    }
    if sum((bool(prompts), file is not None, jsonl is not None)) != 1:
        raise UsageError("give prompts as arguments, or --file, or --jsonl: one of the three")
    if chat and jsonl is not None:
        raise UsageError("--chat is for texts; give messages in the lines of --jsonl")
    if system is not None and not chat:
        raise UsageError("--system is for --chat; give both, or write it into the messages of --jsonl")

    # With torch: not for others.
    from k2dist.cli.batch import Batch, open_output, read_jsonl, read_texts, sampling_fields
    from k2dist.llm import LLM, SamplingParams

    if more_sampling is not None:
        given |= sampling_fields(more_sampling.encode())
    sampling = SamplingParams(**given)
    if jsonl is not None:
        batch = read_jsonl(jsonl, given)
    elif file is not None:
        batch = read_texts(file, sampling, is_chat=chat, system=system)
    else:
        batch = Batch.of_texts(prompts or (), sampling, is_chat=chat, system=system)
    is_shown = False if quiet else None
    try:
        with (
            batch,
            open_output(out) as write,
            LLM(model, lanes=lanes, tp=tp, seed=seed, progress=is_shown) as llm,
        ):
            errors = batch.run(llm, write, progress=is_shown)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    for line in errors.lines():
        print(f"k2dist: {line}", file=sys.stderr, flush=True)
    if errors.num_errors > 0:
        raise typer.Exit(1)
