"""A decode step never asks the device before its one read, and nothing of it is on another device.

The device is `meta`, whose tensors have no numbers: whoever asks for one is refused, and so is a shape that
depends on one. Kernels are Triton's launchers, which check and allocate; what they would launch is left out.
The host's own tensors are on the CPU, and every operation that mixes the two is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from importlib import import_module
from typing import Any

import pytest
import torch
from k2kernels import KernelSet, jit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k2dist.comm import Alone, CapacityRule, Exchange, RehearsalCommunicator, StepAgreement
from k2dist.config import Architecture, read_architecture
from k2dist.engine.form import Form, FormRule
from k2dist.engine.forward import ForwardPass, Model
from k2dist.engine.graphs import TwinRecorder
from k2dist.engine.guard import RowGuard
from k2dist.engine.kernel_check import KernelCheck
from k2dist.engine.load import Places
from k2dist.engine.plain_layer import PlainLayer
from k2dist.engine.sequences import Sequences
from k2dist.engine.static_batch import spare_places
from k2dist.engine.steps import Step, Steps
from k2dist.ids import Generation
from k2dist.messages import Sampling, StepPlan, TokenLogprob
from k2dist.model.latent_cache import LatentCache
from k2dist.model.weights import assemble, assemble_ends, assemble_layer
from k2dist.parallel import Layout, expert_homes, first_layout, shard_plan
from k2dist.planner.fewer_layers import reads_by_layer
from k2dist.rehearsal.load import Load

META = torch.device("meta")
DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}
LOAD = Load(decode=3, context=20, prompt_tokens=0, num_steps=5)
PAGE_TOKENS = 16
KINDS = {
    "greedy": Sampling(temperature=0.0),
    "drawn": Sampling(temperature=0.7, seed=3),
    "filtered": Sampling(temperature=0.7, top_p=0.9, top_k=40, min_p=0.01, seed=3),
    "penalties and bias": Sampling(temperature=0.0, frequency_penalty=0.3, logit_bias={5: 1.0}, min_tokens=9),
    "logprobs": Sampling(temperature=0.7, logprobs=5, seed=3),
}


class Watch(TorchDispatchMode):
    """Refuses what waits, and counts reads. A read gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0
        self.num_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        devices = {x.device.type for x in _tensors((args, kwargs))}
        if name == "aten.copy_" and devices == {"cpu", "meta"}:
            if args[0].device.type == "cpu":
                self.num_reads += 1
                return args[0].zero_()
            assert len(args) > 2 and args[2], "a copy to the device that the host waits for"  # noqa: PT018
            self.num_copies += 1
        elif name == "aten._to_copy" and devices == {"cpu"} and kwargs.get("device") == META:
            assert kwargs.get("non_blocking"), "a copy to the device that the host waits for"
            self.num_copies += 1
        else:
            assert devices != {"cpu", "meta"}, f"{name} mixes devices"
            if devices == {"meta"}:
                assert name not in ("aten._local_scalar_dense", "aten.nonzero", "aten.bincount"), (
                    f"{name} waits"
                )
                assert torch.device(kwargs.get("device") or META) == META, f"{name} leaves the device"
        return func(*args, **kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    torch.utils._pytree.tree_map_(lambda x: found.append(x) if isinstance(x, Tensor) else None, tree)
    return found


class Inline:
    """A device thread that is this one: a watch sees one thread only."""

    def launch(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work())
        return future


class Loop(Alone):
    """Rank 0 of four, which gets back what it sends: enough for shapes."""

    size = 4

    def all_to_all_rows(self, x_ND: Tensor, send: Any, recv: Any) -> Tensor:
        assert (len(send), sum(send)) == (4, len(x_ND))
        return x_ND.clone()


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that other tests have bound already are Triton's own objects."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import KernelInterface

    for kind in (jit.Kernel, KernelInterface, InterpretedFunction):
        monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: lambda *args, **options: None)


def steps_of(
    architecture: Architecture, layout: Layout, world: Alone, recorder: TwinRecorder | None
) -> Steps:
    kernels = KernelSet.triton()
    tensors = {
        read.name: torch.empty(read.cut_shape, dtype=DTYPES[read.dtype], device=META)
        for read in shard_plan(architecture, layout, 0).reads
    }
    weights = assemble(tensors, architecture, layout.place(0), layout.tp, kernels)
    num_pages = LOAD.num_pages(PAGE_TOKENS)
    cache = LatentCache.allocate(
        architecture, num_pages, PAGE_TOKENS, kernels, META, num_spare=spare_places(LOAD.decode)
    )
    lane = RehearsalCommunicator(0, layout.tp)
    homes = [
        expert_homes(layout, layer, layout.place(0).world_rank)
        for layer in range(architecture.num_moe_layers)
    ]
    exchange = Exchange(world, homes, META)
    model = Model(weights, cache, architecture, kernels, layout.tp, frozenset({1}), META)
    rule = FormRule.of(
        tp=layout.tp,
        world_size=world.size,
        padding=None if world.size == 1 else CapacityRule.of(architecture, layout, 1.25),
        most_rows=LOAD.decode,
        most_pages=num_pages,
        split_tokens=None,
    )
    passes = ForwardPass(model, lane, exchange, recorder)
    sequences = Sequences(PAGE_TOKENS, layout.tp)
    return Steps(model, sequences, RowGuard(), lane, exchange, rule, passes, Inline())  # type: ignore[arg-type]


def agreed(plan: StepPlan, *, can_replay: bool) -> StepAgreement:
    return StepAgreement(
        generation=Generation(0),
        step=plan.step,
        num_rows=len(plan.grants),
        is_idle=False,
        is_stopping=False,
        has_decodes=True,
        num_pages=2,
        can_replay=can_replay,
    )


def sampled_as(plan: StepPlan, sampling: Sampling) -> StepPlan:
    from msgspec.structs import replace

    return replace(plan, new=tuple(replace(new, sampling=sampling) for new in plan.new))


SHAPES = {"alone": (1, 1), "four lanes": (4, 1), "tp 2": (2, 2)}
CASES = [(shape, how, "drawn") for shape in SHAPES for how in ("eager", "replayed")]
CASES += [("alone", "replayed", kind) for kind in KINDS if kind != "drawn"]


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize(("shape", "how", "kind"), CASES)
def test_a_decode_step_reads_once(
    tiny_model_dir: Any, shape: str, how: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(num_top: list[int], found: object) -> list[TokenLogprob]:
        """Of zeros there is no logarithm."""
        return [TokenLogprob(token_id=0, logprob=0.0)] * len(num_top)

    monkeypatch.setattr(import_module("k2dist.model.sampler.score"), "_logprobs", nothing)
    architecture = read_architecture(tiny_model_dir)
    lanes, tp = SHAPES[shape]
    layout = first_layout(architecture, lanes=lanes, tp=tp)
    world = Alone() if layout.world_size == 1 else Loop()
    recorder = TwinRecorder(lambda: None) if how == "replayed" else None
    steps = steps_of(architecture, layout, world, recorder)
    before: Step | None = None
    for plan in LOAD.plans(PAGE_TOKENS, architecture.vocab_size):
        plan = sampled_as(plan, KINDS[kind])
        steps._sequences.apply(plan)
        with torch.no_grad(), Watch() as watch:
            step = steps.forward(plan, before, agreed(plan, can_replay=recorder is not None))
            assert watch.num_reads == 0
            steps.sample(step)
            assert watch.num_reads == 1, "the one read of a step"
            assert watch.num_copies > 0
            steps.finish(step)
        before = step
    if recorder is not None:
        assert steps._passes.num_steps_replayed == LOAD.num_steps - 1


@pytest.mark.usefixtures("no_launches")
def test_who_waits_is_seen(tiny_model_dir: Any) -> None:
    """Exact splits are counts that the host must know."""
    architecture = read_architecture(tiny_model_dir)
    steps = steps_of(architecture, first_layout(architecture, lanes=4, tp=1), Loop(), None)
    plan = next(iter(LOAD.plans(PAGE_TOKENS, architecture.vocab_size)))
    steps._sequences.apply(plan)
    with torch.no_grad(), Watch(), pytest.raises(AssertionError, match=r"leaves the device|waits"):
        steps._passes.exactly(steps._passes.stage(steps._sequences.batch(plan), Form()))


class OneDevice(TorchDispatchMode):
    """Refuses operations that mix devices. What asks for numbers is left to the test."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        devices = {x.device.type for x in _tensors((args, kwargs or {})) if x.dim()}
        assert devices != {"cpu", "meta"} or name == "aten.copy_", f"{name} mixes devices"
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("experts", [META, torch.device("cpu")], ids=["experts there", "experts on the CPU"])
def test_a_self_test_stays_on_the_weights_device(
    tiny_model_dir: Any, tp: int, experts: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its two sides are computed, not compared; experts that are elsewhere come to the stream."""
    architecture = read_architecture(tiny_model_dir)
    layout = first_layout(architecture, lanes=1, tp=tp)
    place, places, kernels = layout.place(0), Places(META, experts), KernelSet.triton()
    compared: list[tuple[torch.device, torch.device]] = []

    def note(check: KernelCheck, name: str, found: Tensor, wanted: Tensor) -> Iterator[str]:
        compared.append((found.device, wanted.device))
        return iter(())

    def plain_experts(
        check: KernelCheck, index: int, expert_TK: Tensor, x_TD: Tensor, plain: PlainLayer
    ) -> Tensor:
        return plain.swiglu(x_TD, "mlp.experts.1")[:, None].expand(-1, expert_TK.shape[1], -1)

    monkeypatch.setattr(KernelCheck, "_compare", note)
    monkeypatch.setattr(KernelCheck, "_choice", lambda *args: iter(()))
    monkeypatch.setattr(KernelCheck, "_plain_experts", plain_experts)
    reads = reads_by_layer(shard_plan(architecture, layout, 0).reads)

    def tensors(layer: int | None) -> dict[str, Tensor]:
        return places.put(
            {read.name: torch.zeros(read.cut_shape).to(DTYPES[read.dtype]) for read in reads[layer]}
        )

    with torch.no_grad(), OneDevice():
        lane = assemble_ends(tensors(None), architecture, 0, tp, kernels)
        check = KernelCheck(architecture, place, tp, PAGE_TOKENS, kernels, META)
        check.begin(lane)
        for number in range(architecture.num_layers):
            found = tensors(number)
            layer, on_device = assemble_layer(
                places_on(META, found), architecture, place, tp, kernels, number
            )
            list(check.layer(number, layer, on_device, found))
        list(check.head(lane, tensors(None)))
    assert compared
    assert set(compared) == {(META, META)}


def places_on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
