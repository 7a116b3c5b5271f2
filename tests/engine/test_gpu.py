"""The engine on one CUDA device. Nothing here has run yet: there has been no device.

Results are held against the reference on the CPU in float32, against float64 at K2's own widths, and recorded
steps against eager ones, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from k2kernels import KernelSet
from msgspec.structs import replace
from torch.distributed import HashStore

from k2dist.checkpoint import RandomShard
from k2dist.comm import Alone, NcclCommunicator
from k2dist.config import KIMI_K2, find_architecture
from k2dist.engine import LocalWorld, RankComms
from k2dist.engine.forward import ForwardPass, Hidden, StagedBatch
from k2dist.engine.kernel_check import TOLERANCE, KernelCheck
from k2dist.engine.local import Generated
from k2dist.ids import Generation
from k2dist.messages import RankStats, Sampling
from k2dist.model.weights import assemble_ends, assemble_layer
from k2dist.parallel import first_layout, shard_plan
from k2dist.planner.fewer_layers import first_layers, reads_by_layer
from k2dist.scheduler import Limits

pytestmark = pytest.mark.gpu

DEMO = Path(__file__).parents[2] / "k2dist" / "demo" / "model"
LIMITS = Limits(step_tokens=64, max_running=8, max_waiting=16, chunk_tokens=32)
GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=3)
DRAWN = Sampling(temperature=0.8, top_p=0.9, seed=4, max_tokens=12, ignore_eos=True, logprobs=1)
PROMPTS = [[75], [649, 32, 82], list(range(300, 370)), [5] * 20]
CUDA = torch.device("cuda", 0)


def run(
    model_dir: Path = DEMO, sampling: Sampling = DRAWN, **options: object
) -> tuple[list[Generated], RankStats]:
    with LocalWorld(model_dir, limits=LIMITS, num_pages=64, **options) as world:  # type: ignore[arg-type]
        return world.generate(PROMPTS, sampling), world.ranks[0].stats()


def on_device(sampling: Sampling = DRAWN, **options: object) -> tuple[list[Generated], RankStats]:
    return run(sampling=sampling, device="cuda", **options)


@pytest.mark.parametrize("experts_device", ["auto", "cpu"])
def test_the_demo_model_gives_the_references_tokens(experts_device: str) -> None:
    """In float32. Each rank's self-test has held the kernels to float64 before, on this device."""
    wanted, _ = run(sampling=GREEDY, kernels="reference", dtype="float32")
    found, _ = on_device(GREEDY, dtype="float32", experts_device=experts_device)
    for one, other in zip(found, wanted, strict=True):
        assert one.token_ids == other.token_ids
        found_logprobs, wanted_logprobs = ([p.logprob for p in output.logprobs] for output in (one, other))
        assert found_logprobs == pytest.approx(wanted_logprobs, abs=1e-3)


@pytest.mark.parametrize("experts_device", ["auto", "cpu"])
def test_replayed_steps_have_the_bits_of_eager_ones(experts_device: str) -> None:
    eager, stats = on_device(graphs="off", experts_device=experts_device)
    assert stats.num_steps_replayed == 0
    replayed, stats = on_device(experts_device=experts_device)
    assert replayed == eager
    assert stats.num_recorded > 0
    assert stats.num_steps_replayed > 0
    assert stats.num_decodes_eager == 0
    padded, stats = on_device(experts_device=experts_device, capacity_factor=1.25)
    assert padded == eager
    assert stats.num_steps_padded > 0


def test_over_nccl_it_has_the_bits_of_alone_in_two_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one over NCCL, in the graphs too; these are dropped with the groups, and recorded anew."""
    from k2dist.comm.nccl import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    alone, _ = on_device(capacity_factor=1.25)
    world = LocalWorld(DEMO, limits=LIMITS, num_pages=64, device="cuda", capacity_factor=1.25)
    (rank,) = world.ranks
    join = rank.join

    def join_nccl(comms: RankComms, bells: object, generation: Generation) -> None:
        groups = [
            NcclCommunicator(
                HashStore(),
                generation=generation,
                name=name,
                members=(0,),
                world_rank=0,
                device=CUDA,
                deadline_s=60.0,
                join_deadline_s=60.0,
            )
            for name in ("world", "lane-0")
        ]
        join(RankComms(groups[0], Alone(), groups[1], Alone()), world, generation)

    monkeypatch.setattr(rank, "join", join_nccl)
    with world:
        assert world.generate(PROMPTS, DRAWN) == alone
        first = rank.stats()
        assert first.num_steps_replayed > 0
    before = rank._member
    join_nccl(RankComms(Alone(), Alone(), None, None), world, Generation(1))
    assert before is not None
    assert rank._member is not None
    assert rank.stats().num_recorded == 0, "graphs go with their generation"
    rank.record()
    assert rank.stats().num_recorded == before.passes.num_recorded
    before.comms.fence()
    rank._member.comms.fence()


def test_a_replayed_step_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of torch's allocator, which would count it, nor of the device."""
    forward_pass, allocated = ForwardPass.run, []

    def count() -> int:
        stats = torch.cuda.memory_stats(CUDA)
        return int(stats["allocation.all.allocated"])

    def noted(passes: ForwardPass, staged: StagedBatch) -> Hidden:
        before, num_replayed = count(), passes.num_steps_replayed
        hidden = forward_pass(passes, staged)
        if passes.num_steps_replayed > num_replayed:
            allocated.append(count() - before)
        return hidden

    monkeypatch.setattr(ForwardPass, "run", noted)
    on_device()
    assert len(allocated) > 3
    assert set(allocated) == {0}


def test_a_steady_state_asks_the_device_for_no_memory() -> None:
    """Sampling runs eagerly, from the allocator's cache."""
    with LocalWorld(DEMO, limits=LIMITS, num_pages=64, device="cuda") as world:
        world.generate(PROMPTS, DRAWN)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats(CUDA)["num_device_alloc"]
        world.generate(PROMPTS, DRAWN)
        assert torch.cuda.memory_stats(CUDA)["num_device_alloc"] == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_k2s_own_widths_are_right_to_float64(dtype: torch.dtype) -> None:
    """A dense and an MoE layer of K2 with the experts of one rank of sixteen, half layer by half layer."""
    whole = find_architecture(KIMI_K2)
    sixteen = first_layout(whole, lanes=16, tp=1)
    few, layout = first_layers(whole, sixteen, whole.first_dense_layers + 1)
    place, kernels = layout.place(0), KernelSet.triton(dtype)
    shard = RandomShard(few.scale_block, CUDA, seed=5)
    reads = reads_by_layer(shard_plan(few, layout, 0).reads)
    with torch.inference_mode():
        ends = shard.tensors(reads[None])
        lane = assemble_ends(ends, few, 0, 1, kernels)
        check = KernelCheck(few, place, 1, 64, kernels, CUDA)
        check.begin(lane)
        faults = []
        for number in range(few.num_layers):
            tensors = shard.tensors(reads[number])
            layer, experts = assemble_layer(tensors, few, place, 1, kernels, number)
            faults += check.layer(number, layer, experts, tensors)
        faults += check.head(lane, ends)
    assert not faults
    assert 0 < check.worst < TOLERANCE[dtype][1]


def test_a_split_prompt_has_the_bits_of_a_whole_one() -> None:
    """Halves side by side, on two streams."""
    assert (
        on_device(replace(GREEDY, prompt_logprobs=1), split_tokens=8)[0]
        == on_device(replace(GREEDY, prompt_logprobs=1))[0]
    )
