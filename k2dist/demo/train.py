"""Train the demo model.

    python -m k2dist.demo.train --out DIR [--steps N] [--start-from MODEL_DIR --peak 0.4]

Resumes from DIR/state.pt where there is one; else begins with new weights, or with those of a checkpoint.

Data: `corpus.conversations(seed)`, every batch new, with some copying drills. Matrices by Muon, the rest by
AdamW; warm-up, constant rate, then a linear fall to nothing over the last `FALL` of the steps. DIR receives
the vocabulary, the configs, train.log and state.pt; `python -m k2dist.demo.export` makes a checkpoint of it.

The committed checkpoint took 1,600 steps of some 3,700 tokens on one core (seed 1; about a second a step),
in three goes that each resumed the last: to step 300 at full rate with 4% drills; to 900, falling as if to
end at 1,100; to 1,600, falling to nothing. The first two saw an older corpus: direct sums up to 50 + 50,
temperatures from -30 to 45 alone, slightly other shares of topics. None saw a tool that gives no temperature.

800 steps more, with such tools, began with that checkpoint's FP8 weights (`--start-from`, `--peak 0.4`, seed
2): 400 falling to nothing, when 40% of the weather's results were words only; 79 that fell once more, from a
quarter of the full rate, when 55% were, as now. Both drew all words for the weather alike; 321 (resumed
with `--steps 800 --peak 0.8`, seed 3) took half of them from the twelve common ones, and learned to say them
in lower case too. One go therefore gives other bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional

from k2dist.demo import MODEL_DIR, corpus
from k2dist.demo.batches import Batch, batches, encode, pad
from k2dist.demo.export import read_weights
from k2dist.demo.induction import begin_with_copying_
from k2dist.demo.muon import Muon
from k2dist.demo.shape import write_configs
from k2dist.demo.trainee import Trainee
from k2dist.demo.vocabulary import copy_vocabulary, count_pieces, learn_vocabulary, write_vocabulary
from k2dist.text.tokenizer import Tokenizer

WARM_UP_STEPS = 60
FALL = 0.75  # the last part of the steps, in which the rate falls to 0
MUON_RATE, ADAM_RATE = 0.01, 3e-3
CLIP = 1.0
BALANCE_RATE = 5e-4
_STATE = "state.pt"


@dataclass
class Run:
    """What a run consists of, all of it in `state.pt`."""

    trainee: Trainee
    optimizers: tuple[torch.optim.Optimizer, ...]
    step: int = 0

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part")
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save({"model": self.trainee.state_dict(), "optimizers": states, "step": self.step}, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.trainee.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step = state["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=300, help="longer conversations are left out")
    parser.add_argument("--drills", type=float, default=0.03, help="share of copying drills among the rows")
    parser.add_argument(
        "--start-from", type=Path, help="checkpoint whose weights to begin with; else new ones"
    )
    parser.add_argument(
        "--peak", type=float, default=1.0, help="highest learning rate, as a share of the usual"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--new-vocabulary", action="store_true", help="learn one; else the committed one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 products")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--check-every", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    architecture = write_configs(options.out)
    if options.new_vocabulary:
        write_vocabulary(options.out, learn_vocabulary(count_pieces(options.seed)))
    else:
        copy_vocabulary(MODEL_DIR, options.out)
    tokenizer = Tokenizer.load(options.out)
    dtype = torch.float32 if options.float32 else torch.bfloat16
    trainee = Trainee(architecture, seed=options.seed, dtype=dtype)
    if options.start_from is None:
        begin_with_copying_(trainee, options.seed)
    else:
        trainee.take_published_(read_weights(options.start_from))
    run = Run(trainee, optimizers(trainee))
    if (options.out / _STATE).exists():
        run.load(options.out / _STATE)
    train(run, tokenizer, options)


def optimizers(trainee: Trainee) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the layers; AdamW for embedding, head, router and norms."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for key, param in trainee.weights.items():
        is_plain = param.dim() == 1 or key.endswith(
            ("embed_tokens/weight", "lm_head/weight", "mlp/gate/weight")
        )
        (rest if is_plain else matrices).append(param)
    adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = (Muon(matrices, lr=MUON_RATE, weight_decay=0.02), adam)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate_part(step: int, num_steps: int) -> float:
    """The learning rate's share of its peak at `step`."""
    left = (num_steps - step) / (num_steps * FALL)
    return max(0.0, min(1.0, (step + 1) / WARM_UP_STEPS, left))


def train(run: Run, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    # A resumed run draws other conversations than those it has seen.
    seed = options.seed * 1_000_003 + run.step
    source = batches(
        tokenizer,
        corpus.conversations(seed),
        batch_tokens=options.batch_tokens,
        max_tokens=options.max_tokens,
        drill_share=options.drills,
        seed=seed,
    )
    checks = {kind: list(held_out(tokenizer, kind, 100)) for kind in corpus.KINDS}
    since_s, tokens, losses = time.monotonic(), 0, []
    for batch in islice(source, options.steps - run.step):
        losses.append(take_step(run, batch, options.peak * rate_part(run.step, options.steps)))
        tokens += int((batch.weight_BS > 0).sum())
        run.step += 1
        if run.step % options.log_every == 0:
            spent_s = time.monotonic() - since_s
            _log(
                options.out,
                f"step {run.step} loss {sum(losses) / len(losses):.4f} tokens/s {tokens / spent_s:.0f}",
            )
            since_s, tokens, losses = time.monotonic(), 0, []
        if run.step % options.check_every == 0 or run.step == options.steps:
            parts = (f"{kind} {exact_share(run.trainee, rows):.2f}" for kind, rows in checks.items())
            _log(options.out, f"step {run.step} held out: {', '.join(parts)}")
            run.save(options.out / _STATE)


def take_step(run: Run, batch: Batch, rate: float) -> float:
    """One update; the mean loss of the assistant's tokens."""
    trainee = run.trainee
    for optimizer in run.optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
    trainee.train()
    keep_BS = torch.zeros_like(batch.token_BS, dtype=torch.bool)
    keep_BS[:, :-1] = batch.weight_BS[:, 1:] == 1.0
    target = batch.token_BS[:, 1:][keep_BS[:, :-1]]
    loss = functional.cross_entropy(trainee(batch.token_BS, keep_BS), target)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainee.parameters(), CLIP)
    for optimizer in run.optimizers:
        optimizer.step()
    trainee.balance_(BALANCE_RATE * rate)
    return float(loss.detach())


def held_out(tokenizer: Tokenizer, kind: str, num: int) -> Iterator[tuple[list[int], list[float]]]:
    """Encoded held-out conversations of one kind."""
    rng = Random(f"held out {kind}")
    for _ in range(num):
        yield encode(tokenizer, corpus.held_out_conversation(rng, kind))


@torch.no_grad()
def exact_share(trainee: Trainee, rows: list[tuple[list[int], list[float]]]) -> float:
    """Share of conversations of which greedy decoding would write every assistant token as it stands."""
    trainee.eval()
    num_exact = 0
    ordered = sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(ordered), 25):
        token_BS, weight_BS = pad(ordered[start : start + 25])
        is_wrong = trainee(token_BS).argmax(-1).view_as(token_BS)[:, :-1] != token_BS[:, 1:]
        num_exact += int((~(is_wrong & (weight_BS[:, 1:] == 1.0)).any(1)).sum())
    return num_exact / len(rows)


def _log(out: Path, line: str) -> None:
    print(line, flush=True)
    with (out / "train.log").open("a", encoding="utf-8") as log:
        log.write(line + "\n")


if __name__ == "__main__":
    main()
