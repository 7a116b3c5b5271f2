"""One sequence, computed in different portions, by different paths and in different company."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from k2kernels import KernelSet
from torch import Tensor

if TYPE_CHECKING:
    from tests.model.conftest import Rig, Tokens, World


def portions(rig: Rig, world: World, sequence: Tokens, cuts: list[int]) -> Tensor:
    """Logits of every position, the sequence computed from cut to cut, one step each."""
    steps = zip([0, *cuts], [*cuts, len(sequence.tokens)], strict=True)
    return torch.cat([world.step({0: rig.batch([rig.grant(sequence, a, b)], 1)})[0] for a, b in steps])


def test_a_prompt_has_the_same_bits_however_it_is_cut(rig: Rig, kernels: KernelSet, seed: int) -> None:
    architecture = rig.architecture()
    published = rig.published(architecture)
    sequence = rig.sequence(architecture, 150, 150, 2, random.Random(seed))
    whole = portions(rig, rig.world(architecture, published, kernels=kernels), sequence, [])
    assert torch.isfinite(whole).all()
    for cuts in (list(range(1, 150)), [40, 80, 120], [1, 17, 18, 64, 65, 149]):
        assert torch.equal(
            portions(rig, rig.world(architecture, published, kernels=kernels), sequence, cuts), whole
        )


def test_generated_rows_have_the_same_bits_together_and_one_by_one(
    rig: Rig, kernels: KernelSet, seed: int
) -> None:
    """A recovery recomputes many generated positions in one step."""
    architecture = rig.architecture()
    published = rig.published(architecture)
    sequence = rig.sequence(architecture, 130, 50, 0, random.Random(seed))
    at_once = portions(rig, rig.world(architecture, published, kernels=kernels), sequence, [50])
    for cuts in (list(range(50, 130)), [20, 50, 51, 77]):
        again = portions(rig, rig.world(architecture, published, kernels=kernels), sequence, cuts)
        assert torch.equal(again, at_once)


def test_both_paths_agree_in_float32(rig: Rig, seed: int) -> None:
    """Absorbed and decompressed attention are the same mathematics."""
    architecture = rig.architecture()
    published = rig.published(architecture)
    sequence = rig.sequence(architecture, 140, 140, 0, random.Random(seed))
    as_prompt = portions(rig, rig.world(architecture, published), sequence, [])
    sequence.prompt_len = 1
    as_generated = portions(rig, rig.world(architecture, published), sequence, [1])
    assert (as_prompt - as_generated).abs().max() < 1e-4 * as_prompt.abs().max()


def test_a_row_does_not_see_its_company(rig: Rig, kernels: KernelSet, seed: int) -> None:
    """Sequences step together, rows shuffled, on other pages: bit for bit what each gives alone."""
    architecture = rig.architecture()
    published = rig.published(architecture)
    rng = random.Random(seed)
    shapes = ((1, 1), (30, 18), (61, 61), (97, 20), (40, 39), (70, 1))
    alone, sequences, first_page = [], [], 0
    for num_tokens, prompt_len in shapes:
        sequence = rig.sequence(architecture, num_tokens, prompt_len, 0, rng)
        cuts = [prompt_len] if prompt_len < num_tokens else []
        alone.append(portions(rig, rig.world(architecture, published, kernels=kernels), sequence, cuts))
        sequence.pages = [page + first_page for page in reversed(sequence.pages)]
        first_page += len(sequence.pages)
        sequences.append(sequence)
    world = rig.world(architecture, published, kernels=kernels)
    done = [0] * len(sequences)
    together: list[list[Tensor]] = [[] for _ in sequences]
    while any(at < len(sequence.tokens) for at, sequence in zip(done, sequences, strict=True)):
        grants = {}
        for i, sequence in enumerate(sequences):
            end = sequence.prompt_len if done[i] < sequence.prompt_len else len(sequence.tokens)
            stop = min(end, done[i] + rng.randint(0, 25))
            if stop > done[i]:
                grants[i] = rig.grant(sequence, done[i], stop)
        if not grants:
            continue
        logits = world.step({0: rig.batch(list(grants.values()), 1, rng)})[0]
        counts = [grant.stop - grant.start for grant in grants.values()]
        for (i, grant), rows in zip(grants.items(), logits.split(counts), strict=True):
            together[i].append(rows)
            done[i] = grant.stop
    for i, rows in enumerate(together):
        assert torch.equal(torch.cat(rows), alone[i]), f"sequence {i}"


def test_logits_come_in_the_order_asked_for(rig: Rig, seed: int) -> None:
    architecture = rig.architecture()
    published = rig.published(architecture)
    sequence = rig.sequence(architecture, 40, 40, 0, random.Random(seed))
    batch = rig.batch([rig.grant(sequence, 0, 40)], 1)
    every = rig.world(architecture, published).step({0: batch})[0]
    wanted = torch.tensor([7, 39, 0, 12])
    some = rig.world(architecture, published).step({0: rig.sampling(batch, wanted)})[0]
    assert torch.equal(some, every[wanted])
    none = rig.world(architecture, published).step({0: rig.sampling(batch, wanted[:0])})[0]
    assert none.shape == (0, architecture.vocab_size)


def test_the_observer_sees_every_half_layer(rig: Rig, seed: int) -> None:
    architecture = rig.architecture()
    sequence = rig.sequence(architecture, 5, 5, 0, random.Random(seed))
    seen: dict[str, tuple[int, ...]] = {}
    world = rig.world(architecture, rig.published(architecture))
    world.step(
        {0: rig.batch([rig.grant(sequence, 0, 5)], 1)},
        lambda name, h_tD: seen.update({name: tuple(h_tD.shape)}),
    )
    names = ["embedding"]
    names += [f"layers.{i}.{half}" for i in range(3) for half in ("attention", "mlp")]
    assert list(seen) == names
    assert set(seen.values()) == {(5, architecture.hidden_size)}
