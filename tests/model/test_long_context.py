"""Long sequences through the paged cache: right against float64 without pages, memory in pages alone.

The queries are sharpened, so that a row looks at a few keys anywhere behind it: a key read from the wrong
page would show, and not drown in the average of thousands.

With one layer no row reads what attention gave another: latents come from the tokens alone. So all 131,072
rows write theirs, and attention, whose time grows with the square, is computed where it is looked at.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from k2dist.config import Architecture
from k2dist.engine.plain_layer import PlainLayer
from k2dist.model import decoder
from k2dist.model.latent_cache import LatentCache
from k2dist.model.yarn import inv_freq, rope_table
from tests.published_config import published_config

if TYPE_CHECKING:
    from tests.model.conftest import Rig, Tokens

NUM_HEADS = 2
V_HEAD_DIM = 16
NUM_GENERATED = 8
SHARPNESS = 8.0
NUM_SAMPLED = 50  # rows whose attention is looked at
EARLY = 1  # the step after which memory may grow no more: all code has run once
SLACK_BYTES = 4e6  # of the process, besides pages; a leaked chunk would be as much


def tiny(rig: Rig) -> Architecture:
    """One dense layer of two heads, with K2's original context."""
    return rig.architecture(
        hidden_size=32,
        num_layers=1,
        first_dense_layers=1,
        num_heads=NUM_HEADS,
        v_head_dim=V_HEAD_DIM,
        intermediate_size=32,
        yarn=replace(rig.yarn(32.0), original_max_positions=4096),
        max_positions=131072,
    )


def sharp(rig: Rig, architecture: Architecture, seed: int) -> dict[str, Tensor]:
    published = rig.published(architecture, seed)
    for name, value in published.items():
        if name.endswith("q_b_proj.weight_scale_inv"):
            value *= SHARPNESS
    return published


@dataclass
class Memory:
    """After one step: bytes of all tensors but those that the test keeps, and of the process."""

    live_bytes: int
    rss_bytes: int

    @classmethod
    def now(cls, kept: list[Tensor]) -> Memory:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
        tensors = [value for value in gc.get_objects() if type(value) is Tensor]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        num_kept = sum(t.untyped_storage().nbytes() for t in kept)
        rss_bytes = int(psutil.Process().memory_info().rss)
        return cls(sum(storages.values()) - num_kept, rss_bytes - num_kept)


@dataclass
class Step:
    """Rows [start, stop); what attention gives them is zeros unless `attends`."""

    start: int
    stop: int
    attends: bool = True

    @property
    def rows(self) -> range:
        return range(self.start, self.stop)


@dataclass
class Computed:
    """Logits of the last row of each step, what attention added to each row, memory early and at the end."""

    logits: Tensor
    attention_TD: Tensor
    early: Memory  # after step EARLY
    late: Memory


def through_pages(
    rig: Rig, architecture: Architecture, published: dict[str, Tensor], sequence: Tokens, steps: list[Step]
) -> Computed:
    """In float32."""
    world = rig.world(architecture, published, num_pages=1)
    (rank,) = world.ranks
    assert rank.cache is not None
    page_tokens = rank.cache.page_tokens
    rank.cache = LatentCache.allocate(architecture, len(sequence.pages), page_tokens, rank.kernels)
    writes_only = dataclasses.replace(rank.kernels, mla_prefill=no_attention)
    logits: list[Tensor] = []
    stream: list[Tensor] = []

    def see(name: str, h_TD: Tensor) -> None:
        if name == "embedding":
            stream.append(h_TD)
        elif name == "layers.0.attention":
            stream[-1] = h_TD - stream[-1]

    memory: list[Memory] = []
    for number, step in enumerate(steps):
        grant, last_row = rig.grant(sequence, step.start, step.stop), torch.tensor([len(step.rows) - 1])
        batch = rig.sampling(rig.batch([grant], 1), last_row)
        with torch.inference_mode():
            logits.append(
                decoder.forward(
                    batch,
                    rank.weights,
                    rank.cache,
                    rank.lane,
                    rank.exchange,
                    architecture,
                    rank.kernels if step.attends else writes_only,
                    see,
                )
            )
        del batch
        if number == EARLY or step is steps[-1]:
            memory.append(Memory.now(logits + stream))
    return Computed(torch.cat(logits), torch.cat(stream), *memory)


def no_attention(q_THD: Tensor, *_: object) -> Tensor:
    """In place of `mla_prefill`: rows whose attention nobody looks at."""
    return q_THD.new_zeros(len(q_THD), NUM_HEADS, V_HEAD_DIM)


def in_steps(sequence: Tokens, chunk: int, num_attending: int) -> Iterator[Step]:
    """The prompt in chunks, whose last `num_attending` rows attend; then one generated token per step."""
    for start in range(0, sequence.prompt_len, chunk):
        stop = min(start + chunk, sequence.prompt_len)
        middle = max(start, stop - num_attending)
        if start < middle:
            yield Step(start, middle, attends=False)
        yield Step(middle, stop)
    for position in range(sequence.prompt_len, len(sequence.tokens)):
        yield Step(position, position + 1)


def in_float64(
    architecture: Architecture, published: dict[str, Tensor], tokens: list[int], rows: list[int]
) -> tuple[Tensor, Tensor]:
    """Logits of `rows`, and what attention adds to them; of one layer, where keys need no other rows."""
    h_TD = published["model.embed_tokens.weight"].double()[tokens]
    plain = PlainLayer(published, architecture, 0, is_served=False)
    x_TD = plain.attention_input(h_TD)
    added_SD = torch.cat([plain.attention(x_TD[: row + 1], row) for row in rows])
    h_SD = h_TD[rows] + added_SD
    h_SD = h_SD + plain.swiglu(plain.mlp_input(h_SD), "mlp")
    norm_S1 = (h_SD.square().mean(-1, keepdim=True) + architecture.rms_norm_eps).sqrt()
    x_SD = h_SD / norm_S1 * published["model.norm.weight"].double()
    return x_SD @ published["lm_head.weight"].double().T, added_SD


def check(rig: Rig, num_tokens: int, chunk: int, num_attending: int, seed: int) -> None:
    architecture = tiny(rig)
    published = sharp(rig, architecture, seed)
    rng = random.Random(seed)
    sequence = rig.sequence(architecture, num_tokens, num_tokens - NUM_GENERATED, 0, rng)
    steps = list(in_steps(sequence, chunk, num_attending))
    computed = through_pages(rig, architecture, published, sequence, steps)
    ends = {number: step.stop - 1 for number, step in enumerate(steps) if step.attends}
    attending = [row for step in steps if step.attends for row in step.rows]
    rows = sorted({*ends.values(), *rng.sample(attending, NUM_SAMPLED)})
    logits, added_SD = in_float64(architecture, published, sequence.tokens, rows)
    wanted = logits[[rows.index(end) for end in ends.values()]]
    off = (computed.logits[list(ends)] - wanted).abs().max() / wanted.abs().max()
    assert off < 1e-4, f"logits are off by {off:.1e} of the largest"
    off_S = (computed.attention_TD[rows] - added_SD).norm(dim=-1) / added_SD.norm(dim=-1)
    assert off_S.max() < 1e-3, f"attention is off by {off_S.max():.1e} at row {rows[int(off_S.argmax())]}"

    assert computed.late.live_bytes == computed.early.live_bytes, "a step leaves nothing but latents"
    page_bytes = num_tokens * architecture.latent_dim * 4
    grown = computed.late.rss_bytes - computed.early.rss_bytes
    assert grown < page_bytes + SLACK_BYTES, f"{grown:,} bytes more, of which pages are {page_bytes:,}"


def test_16384_tokens(rig: Rig, seed: int) -> None:
    check(rig, 16384, 2000, 2000, seed)


@pytest.mark.slow
def test_131072_tokens(rig: Rig, seed: int) -> None:
    check(rig, 131072, 4096, 128, seed)


# -- positions -----------------------------------------------------------------------------------------------

K2_POSITIONS = 131072


def k2(rig: Rig, factor: float) -> Architecture:
    return rig.architecture(
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        rope_theta=50000.0,
        yarn=replace(rig.yarn(factor), original_max_positions=4096),
        max_positions=K2_POSITIONS,
    )


@pytest.mark.parametrize("factor", [32.0, 64.0])
def test_every_angle_of_k2_is_the_float32_product_and_its_cosine_exact(rig: Rig, factor: float) -> None:
    """All 131,072 positions. The product is rounded once, as in the published code; its cosine to the last
    bit or two, which at these angles only a range reduction with enough digits of pi gives."""
    architecture = k2(rig, factor)
    freq_F = inv_freq(architecture)
    table = rope_table(architecture, K2_POSITIONS)
    position_P1 = torch.arange(K2_POSITIONS, dtype=torch.float64)[:, None]
    exact_PF = position_P1 * freq_F.double()
    angle_PF = exact_PF.float()
    assert torch.equal(angle_PF, position_P1.float() * freq_F)
    assert float((table.cos_PF.double() - angle_PF.double().cos()).abs().max()) < 2**-23
    assert float((table.sin_PF.double() - angle_PF.double().sin()).abs().max()) < 2**-23


def test_frequencies_are_within_a_rounding_of_float64(rig: Rig) -> None:
    """K2's pairs 0 to 19 keep their frequency, 20 to 31 turn 32 times slower (beta_fast = beta_slow = 1)."""
    pair_F = torch.arange(32, dtype=torch.float64)
    exact_F = 50000.0 ** (-2 * pair_F / 64)
    exact_F[20:] /= 32
    assert float((inv_freq(k2(rig, 32.0)).double() / exact_F - 1).abs().max()) < 4 * 2**-24


def test_an_angle_does_not_depend_on_how_far_the_table_reaches(rig: Rig) -> None:
    architecture = k2(rig, 32.0)
    whole = rope_table(architecture, K2_POSITIONS)
    for num_positions in (1, 7, 64, 4097, 100_000):
        table = rope_table(architecture, num_positions)
        assert torch.equal(table.cos_PF, whole.cos_PF[:num_positions])
        assert torch.equal(table.sin_PF, whole.sin_PF[:num_positions])


def test_angles_are_those_of_transformers(rig: Rig) -> None:
    """Its rotary embedding, where a 131,072-position config is real, at positions over the whole range."""
    transformers = pytest.importorskip("transformers")
    architecture = k2(rig, 32.0)
    text = published_config(architecture)
    text.pop("quantization_config", None)
    config = transformers.DeepseekV3Config(**{**text, "model_type": "deepseek_v3"})
    theirs = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)
    position_T = torch.cat((torch.arange(0, K2_POSITIONS, 997), torch.tensor([4095, 4096, 131071])))
    cos_TR, sin_TR = (x[0] for x in theirs(torch.zeros(1), position_T[None]))
    table = rope_table(architecture, K2_POSITIONS)
    cos_TF, sin_TF = table.at(position_T)
    # Theirs holds each angle twice, in halves. One bit of a frequency would be 0.008 here, at the far end.
    assert float((cos_TR[:, :32] - cos_TF).abs().max()) == 0.0
    assert float((sin_TR[:, :32] - sin_TF).abs().max()) == 0.0
