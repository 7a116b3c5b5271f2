"""A decode step never asks the device before its one read, and nothing of it is on another device.

The device is `meta`, whose tensors have no numbers: whoever asks for one is refused, and so is a shape that
depends on one. Kernels are Triton's launchers, which check and allocate; what they would launch is left out.
The host's own tensors are on the CPU, and every operation that mixes the two is looked at.
"""

from __future__ import annotations

import inspect
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
from k2dist.engine.graphs import Recorder, TwinRecorder
from k2dist.engine.guard import RowGuard
from k2dist.engine.kernel_check import KernelCheck
from k2dist.engine.load import Places
from k2dist.engine.plain_layer import PlainLayer
from k2dist.engine.sequences import Sequences
from k2dist.engine.solo import solo_batch, solo_exchange
from k2dist.engine.steps import Step, Steps
from k2dist.engine.warm_up import warm_up
from k2dist.ids import Generation
from k2dist.messages import Sampling, StepPlan, TokenLogprob
from k2dist.model.latent_cache import LatentCache
from k2dist.model.pieces import in_line
from k2dist.model.weights import assemble, assemble_ends, assemble_layer
from k2dist.parallel import Layout, expert_homes, first_layout, shard_plan
from k2dist.parallel.buckets import spare_places
from k2dist.planner.fewer_layers import reads_by_layer
from k2dist.rehearsal.load import Load
from k2dist.scheduler import Limits

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


def model_of(architecture: Architecture, layout: Layout, num_pages: int) -> Model:
    kernels = KernelSet.triton()
    tensors = {
        read.name: torch.empty(read.cut_shape, dtype=DTYPES[read.dtype], device=META)
        for read in shard_plan(architecture, layout, 0).reads
    }
    weights = assemble(tensors, architecture, layout.place(0), layout.tp, kernels)
    cache = LatentCache.allocate(
        architecture, num_pages, PAGE_TOKENS, kernels, META, num_spare=spare_places(24)
    )
    return Model(weights, cache, architecture, kernels, layout.tp, frozenset({1}), META)


def steps_of(architecture: Architecture, layout: Layout, world: Alone, recorder: Recorder | None) -> Steps:
    num_pages = LOAD.num_pages(PAGE_TOKENS)
    model = model_of(architecture, layout, num_pages)
    lane = RehearsalCommunicator(0, layout.tp)
    homes = [
        expert_homes(layout, layer, layout.place(0).world_rank)
        for layer in range(architecture.num_moe_layers)
    ]
    exchange = Exchange(world, homes, META)
    rule = FormRule.of(
        tp=layout.tp,
        world_size=world.size,
        padding=None if world.size == 1 else CapacityRule.of(architecture, layout, 1.25),
        most_rows=LOAD.decode,
        most_pages=num_pages,
        split_tokens=None,
    )
    rule = rule.only(rule.buckets[:1] if recorder is not None else ())
    passes = ForwardPass(model, lane, exchange, next(iter(rule.buckets), None))
    for bucket in rule.buckets:
        assert recorder is not None
        with torch.no_grad():
            passes.record(rule.recorded(bucket), recorder)
    sequences = Sequences(PAGE_TOKENS, layout.tp)
    return Steps(model, sequences, RowGuard(), lane, exchange, rule, passes, Inline())  # type: ignore[arg-type]


def agreed(plan: StepPlan) -> StepAgreement:
    return StepAgreement(
        generation=Generation(0),
        step=plan.step,
        num_rows=len(plan.grants),
        is_idle=False,
        is_stopping=False,
        has_decodes=True,
        num_pages=2,
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
            step = steps.forward(plan, before, agreed(plan))
            assert watch.num_reads == 0
            steps.sample(step)
            assert watch.num_reads == 1, "the one read of a step"
            assert watch.num_copies > 0
            steps.finish(step)
        before = step
    if recorder is not None:
        assert steps._passes.num_steps_replayed == LOAD.num_steps


class Launches(TorchDispatchMode):
    """Counts what torch launches on the device."""

    VIEWS = frozenset(
        (
            *("alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty"),
            *("permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose"),
            *("unbind", "unsqueeze", "view", "_unsafe_view"),
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_there = any(x.device == META for x in _tensors((args, kwargs))) or kwargs.get("device") == META
        self.count += is_there and str(func.overloadpacket).removeprefix("aten.") not in self.VIEWS
        return func(*args, **kwargs)


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize(("kind", "most"), [("greedy", 50), ("drawn", 82), ("filtered", 142)])
def test_sampling_launches_no_more_than_is_said(tiny_model_dir: Any, kind: str, most: int) -> None:
    """Behind a replayed forward pass, in any number of rows; the head is one launch more."""
    architecture = read_architecture(tiny_model_dir)
    steps = steps_of(
        architecture, first_layout(architecture, lanes=1, tp=1), Alone(), TwinRecorder(lambda: None)
    )
    plan = sampled_as(next(iter(LOAD.plans(PAGE_TOKENS, architecture.vocab_size))), KINDS[kind])
    steps._sequences.apply(plan)
    with torch.no_grad(), Watch():
        step = steps.forward(plan, None, agreed(plan))
        with Launches() as launches:
            steps.sample(step)
    assert 20 < launches.count <= most


class KeptRecorder:
    """Recordings that launch nothing and give what is there, as graphs do: what remains is the host's own."""

    def record(self, begin: Any) -> Any:
        class Kept:
            result = in_line(begin())

            def replay(self) -> Tensor:
                return self.result

        return Kept()


class Allocations(TorchDispatchMode):
    """Notes tensors on the device that were not there before."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {x.untyped_storage()._cdata for x in _tensors((args, kwargs)) if x.device == META}
        found = func(*args, **kwargs)
        if any(x.device == META and x.untyped_storage()._cdata not in known for x in _tensors(found)):
            self.made.append(str(func.overloadpacket))
        return found


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_replayed_pass_allocates_nothing(tiny_model_dir: Any, shape: str) -> None:
    """What goes round a graph: numbers are copied to where they are read, and views are views."""
    architecture = read_architecture(tiny_model_dir)
    lanes, tp = SHAPES[shape]
    layout = first_layout(architecture, lanes=lanes, tp=tp)
    world = Alone() if layout.world_size == 1 else Loop()
    steps = steps_of(architecture, layout, world, KeptRecorder())
    passes = steps._passes
    for plan in LOAD.plans(PAGE_TOKENS, architecture.vocab_size):
        steps._sequences.apply(plan)
        batch = steps._sequences.batch(plan)
        with torch.no_grad(), Watch(), Allocations() as allocations:
            passes.run(passes.stage(batch, steps._rule.form(agreed(plan))))
        assert allocations.made == []
        for grant in plan.grants:
            steps._sequences.append(grant.seq_id, 1)
    assert passes.num_steps_replayed == LOAD.num_steps
    with torch.no_grad(), Watch(), Allocations() as allocations:
        passes.try_out(steps._rule.recorded(steps._rule.buckets[0]))
    assert allocations.made, "an eager step is seen"


@pytest.mark.usefixtures("no_launches")
def test_who_waits_is_seen(tiny_model_dir: Any) -> None:
    """Exact splits are counts that the host must know."""
    architecture = read_architecture(tiny_model_dir)
    steps = steps_of(architecture, first_layout(architecture, lanes=4, tp=1), Loop(), None)
    plan = next(iter(LOAD.plans(PAGE_TOKENS, architecture.vocab_size)))
    steps._sequences.apply(plan)
    with torch.no_grad(), Watch(), pytest.raises(AssertionError, match=r"leaves the device|waits"):
        steps._passes.exactly(steps._passes.stage(steps._sequences.batch(plan), Form()))


def specialised(kernel: Any, args: Any, options: dict[str, Any]) -> tuple[object, ...]:
    """What Triton compiles a kernel anew for: constants, types, integers that are 1 or multiples of 16, and
    addresses that are."""
    if isinstance(kernel, jit.Kernel):
        function, varies = kernel.function, set(kernel.varies)
    else:  # Triton's own by now: to be compiled, or interpreted where other tests began so
        function = kernel.fn
        if hasattr(kernel, "params"):
            varies = {p.name for p in kernel.params if p.do_not_specialize}
        else:
            varies = set(kernel.kwargs["do_not_specialize"])
    of_args = [
        (x.dtype, x.storage_offset() * x.itemsize % 16 == 0)
        if isinstance(x, Tensor)
        else ((x == 1, x % 16 == 0) if isinstance(x, int) else type(x))
        for name, x in zip(inspect.signature(function).parameters, args, strict=False)
        if name not in varies
    ]
    return (function.__name__, *sorted(options.items()), *of_args)


def test_once_warm_no_step_compiles_a_kernel(tiny_model_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of any number of rows, and generated rows that are eager beside them."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import KernelInterface

    launched: set[tuple[object, ...]] = set()
    for kind in (jit.Kernel, KernelInterface, InterpretedFunction):
        monkeypatch.setattr(
            kind,
            "__getitem__",
            lambda kernel, grid: lambda *args, **options: launched.add(specialised(kernel, args, options)),
        )
    architecture = read_architecture(tiny_model_dir)
    layout = first_layout(architecture, lanes=1, tp=1)
    model = model_of(architecture, layout, num_pages=24)
    limits = Limits(step_tokens=160, max_running=24, max_waiting=9, chunk_tokens=96)
    rule = FormRule.of(tp=1, world_size=1, padding=None, most_rows=24, most_pages=24, split_tokens=None)
    warm_up(model, layout, 0, rule, limits)
    passes = ForwardPass(model, Alone(), solo_exchange(architecture, layout.place(0), META))
    warm = set(launched)
    launched.clear()
    with torch.inference_mode(), Watch():
        for num_rows in (1, 2, 5, 15, 16, 17, 32, 33, 48, 63, 64, 65, 96):
            prompt = solo_batch(num_rows, PAGE_TOKENS, 0, num_rows, is_prompt=True)
            passes.run(passes.stage(prompt, Form()))
        for num_rows in (1, 3, 16, 20):
            generated = solo_batch(num_rows, PAGE_TOKENS, 0, num_rows, is_prompt=False)
            passes.run(passes.stage(generated, Form()))
    assert len(launched) > 20
    assert launched <= warm, sorted(map(str, launched - warm))


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
