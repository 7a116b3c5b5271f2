"""The same bits (design 3.6): a request's tokens and logprobs, alone or among 32 others, in any layout,
however its prompt is cut, preempted or not, from a cached prefix or not, and after a recovery.

What each probe gives alone, on one lane with all experts, is the standard; every scenario must equal it bit
for bit at the same tp, kernels and dtype. The last tests show that the comparison sees what it is for.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from k2kernels import KernelSet, Linear, QuantisedRows
from k2kernels.native import NoNativeKernelsError, load
from msgspec.structs import replace
from torch import Tensor
from torch.nn.functional import linear

from k2dist.checkpoint import random_tensors, write_checkpoint
from k2dist.comm import ThreadCommunicator
from k2dist.config import read_architecture
from k2dist.engine import Feed, Generated, LocalWorld, runtime
from k2dist.engine.selftest import SelfTestReport
from k2dist.ids import ExpertId, LaneId, RequestId, TpRank, WorldRank
from k2dist.messages import FinishReason, Request, Sampling, TokenLogprob
from k2dist.parallel import Layout, RankPlace
from k2dist.scheduler import Limits
from k2dist.scheduler.roster import Roster

KERNELS = ("reference", "native")  # every set that claims the same bits, by the name a config gives it
DTYPES = ("float32", "bfloat16")
TPS = (1, 2, 4)


class Setting(NamedTuple):
    """Within one the bits are the same."""

    kernels: str
    dtype: str
    tp: int

    def __str__(self) -> str:
        return f"{self.kernels}-{self.dtype}-tp{self.tp}"


SETTINGS = tuple(
    Setting(kernels, dtype, tp)
    for kernels, dtype, tp in itertools.product(KERNELS, DTYPES, TPS)
    if (kernels, dtype) != ("native", "float32")  # it has no such form
)
NUM_EXPERTS, TOP_K = 16, 3
MANY_PAGES, FEW_PAGES = 128, 12
NUM_KNOWN = 2  # tokens of an output that a recovery brings along


@dataclass(frozen=True)
class Scenario:
    """Experts lie on the last `expert_ranks` ranks, of which the last `own_ranks` have no lane."""

    lanes: int
    expert_ranks: int
    own_ranks: int = 0
    chunk_tokens: int = 24
    num_pages: int = MANY_PAGES  # per lane; few: requests are preempted and recomputed
    page_tokens: int = 16
    tps: tuple[int, ...] = TPS

    def __str__(self) -> str:
        own = f"+{self.own_ranks}" if self.own_ranks else ""
        pages = f"{self.num_pages}x{self.page_tokens}"
        return f"{self.lanes}x{self.expert_ranks}{own}-chunk{self.chunk_tokens}-pages{pages}"

    def layout(self, tp: int, num_moe_layers: int) -> Layout:
        num_laned = self.lanes * tp
        first_holder = num_laned + self.own_ranks - self.expert_ranks

        def place(rank: int) -> RankPlace:
            is_holder, has_lane = rank >= first_holder, rank < num_laned
            mine = range(rank - first_holder, NUM_EXPERTS, self.expert_ranks) if is_holder else range(0)
            return RankPlace(
                world_rank=WorldRank(rank),
                lane=LaneId(rank // tp) if has_lane else None,
                tp_rank=TpRank(rank % tp) if has_lane else None,
                experts=(tuple(map(ExpertId, mine)),) * num_moe_layers,
            )

        return Layout(tp=tp, ranks=tuple(map(place, range(num_laned + self.own_ranks))))


ALONE = Scenario(lanes=1, expert_ranks=1, chunk_tokens=64)
SCENARIOS = (  # each number of lanes beside each of 1, 2, 4 ranks with experts, within all tp together
    Scenario(lanes=1, expert_ranks=1, chunk_tokens=11, tps=(1,)),
    Scenario(lanes=1, expert_ranks=2, own_ranks=1, num_pages=FEW_PAGES, tps=(1, 4)),
    Scenario(lanes=1, expert_ranks=4, own_ranks=4, num_pages=FEW_PAGES, tps=(2,)),
    Scenario(lanes=2, expert_ranks=1, chunk_tokens=13, tps=(1, 2)),
    Scenario(lanes=2, expert_ranks=2, chunk_tokens=64, tps=(1, 4)),
    Scenario(lanes=2, expert_ranks=4, own_ranks=1, chunk_tokens=64, page_tokens=64, tps=(2,)),
    Scenario(lanes=4, expert_ranks=1, chunk_tokens=64, page_tokens=64, tps=(1,)),
    Scenario(lanes=4, expert_ranks=2, chunk_tokens=17, tps=(1, 2)),
    Scenario(lanes=4, expert_ranks=4, tps=(4,)),
)


def prompt(number: int, num_tokens: int) -> tuple[int, ...]:
    return tuple((7 * number + 13 * j * j + 5 * j + number * j) % 256 for j in range(num_tokens))


def probes() -> list[Request]:
    """Prompts of one token, of less than a tile of keys, of just one, of more; sampled in as many ways."""
    samplings = (
        (1, Sampling(temperature=0.0, logprobs=5)),
        (79, Sampling(temperature=0.8, top_p=0.9, seed=11, logprobs=5)),
        (33, Sampling(temperature=1.2, repetition_penalty=1.3, frequency_penalty=0.4, seed=5, logprobs=5)),
        (64, Sampling(temperature=0.0, presence_penalty=0.7, logit_bias={17: 2.0}, logprobs=20)),
        (40, Sampling(temperature=1.0, top_k=20, min_p=0.01, seed=2**63, logprobs=0, prompt_logprobs=3)),
    )
    return [request(number, *how, max_tokens=4) for number, how in enumerate(samplings)]


def fillers() -> list[Request]:
    """28 others, many of which soon need a page more: together with the probes there are 33."""
    return [
        request(number, (15, 3, 31, 14, 8)[number % 5], Sampling(seed=number, logprobs=1), max_tokens=4)
        for number in range(5, 33)
    ]


def request(number: int, prompt_len: int, sampling: Sampling, *, max_tokens: int) -> Request:
    return Request(
        request_id=RequestId(str(number)),
        prompt=prompt(number, prompt_len),
        sampling=replace(sampling, max_tokens=max_tokens, ignore_eos=True),
    )


Bits = tuple[list[int], list[TokenLogprob], list[TokenLogprob], FinishReason | None]


def bits(output: Generated) -> Bits:
    """All that is promised."""
    return output.token_ids, output.logprobs, output.prompt_logprobs, output.finish


def differing(outputs: Sequence[Bits], expected: Sequence[Bits]) -> list[int]:
    return [i for i, (one, other) in enumerate(zip(outputs, expected, strict=True)) if one != other]


@dataclass
class Case:
    """What the probes give alone in one setting, and all 33 in the first company."""

    model_dir: Path
    setting: Setting
    alone: list[Bits] = field(default_factory=list)
    company: list[Bits] = field(default_factory=list)

    def probe_alone(self) -> None:
        with self.open(ALONE) as world:
            self.alone = [bits(ask(world, [probe])[0]) for probe in probes()]

    def probe_in_company(self, scenario: Scenario) -> list[Bits]:
        """The others, then the probes: these wait for pages."""
        with self.open(scenario) as world:
            return [bits(output) for output in ask(world, [*fillers(), *probes()])]

    def open(self, scenario: Scenario) -> LocalWorld:
        architecture = read_architecture(self.model_dir)
        return LocalWorld(
            self.model_dir,
            scenario.layout(self.setting.tp, architecture.num_moe_layers),
            limits=Limits(
                step_tokens=max(64, scenario.chunk_tokens),
                chunk_tokens=scenario.chunk_tokens,
                max_running=33,
                max_waiting=64,
            ),
            page_tokens=scenario.page_tokens,
            num_pages=scenario.num_pages,
            kernels=self.setting.kernels,
            dtype=self.setting.dtype,
        )


def ask(world: LocalWorld, requests: Sequence[Request]) -> list[Generated]:
    """All at once, spread over the lanes in turn; in order."""
    feed = Feed(world.ports, lane_outputs=len(requests))
    prefix = f"{world.ports[0].events(0, 0.0).next}-"  # ids that this world has not seen
    outputs = [
        feed.put(replace(each, request_id=RequestId(prefix + each.request_id)), i % len(world.ports))[0]
        for i, each in enumerate(requests)
    ]
    while len(feed):
        feed.wait(0.05)
    errors = [output.error for output in outputs if output.error or not output.token_ids]
    assert not errors, errors[0]
    return outputs


def recovered(each: Request, alone: Bits) -> Request:
    """As a lane is told of it that takes it over."""
    return replace(each, generated={0: tuple(alone[0][:NUM_KNOWN])})


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with fewer, smaller layers: what counts here is the number of steps."""
    small_dir = tmp_path_factory.mktemp("small-k2")
    for name in ("generation_config.json", "tiktoken.model", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, small_dir)
    config = json.loads((tiny_model_dir / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "hidden_size": 128, "n_routed_experts": NUM_EXPERTS}
    config |= {"n_shared_experts": 1, "num_experts_per_tok": TOP_K}
    (small_dir / "config.json").write_text(json.dumps(config))
    architecture = read_architecture(small_dir)
    write_checkpoint(small_dir, architecture, random_tensors(architecture, seed=2))
    return small_dir


@pytest.fixture(scope="module")
def quick_start() -> Iterator[None]:
    """Ranks do not test themselves: it would be half of the time here."""
    passed = SelfTestReport(num_tensors=0, num_bytes=0, has_manifest=False, worst_error=0.0, test_s=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "self_test", lambda *_, **__: passed)
        yield


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, model_dir: Path, quick_start: None) -> Case:
    if request.param.kernels == "native":
        try:
            load()
        except NoNativeKernelsError as error:
            pytest.skip(str(error))
    case = Case(model_dir, request.param)
    case.probe_alone()
    return case


@pytest.fixture
def num_preempted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A one for each sequence that loses its pages."""
    found: list[int] = []
    preempt_last = Roster.preempt_last

    def counting(roster: Roster) -> None:
        found.append(1)
        preempt_last(roster)

    monkeypatch.setattr(Roster, "preempt_last", counting)
    return found


@pytest.mark.parametrize(
    ("case", "scenario"),
    [(setting, scenario) for setting in SETTINGS for scenario in SCENARIOS if setting.tp in scenario.tps],
    indirect=["case"],
    ids=str,
)
def test_company_layout_cut_and_preemption_change_no_bit(
    case: Case, scenario: Scenario, num_preempted: list[int]
) -> None:
    found = case.probe_in_company(scenario)
    assert differing(found[-len(case.alone) :], case.alone) == []
    case.company = case.company or found
    assert differing(found, case.company) == []
    assert bool(num_preempted) == (scenario.num_pages == FEW_PAGES)


@pytest.mark.parametrize("case", SETTINGS, indirect=True, ids=str)
def test_recomputation_changes_no_bit(case: Case) -> None:
    """By a lane that takes the requests over from their tokens, with and without their prefixes cached."""
    takeover = [recovered(probe, alone) for probe, alone in zip(probes(), case.alone, strict=True)]
    rest = [(alone[0][NUM_KNOWN:], alone[1][NUM_KNOWN:], [], alone[3]) for alone in case.alone]
    with case.open(ALONE) as world:
        for is_cached in (False, True):
            outputs = ask(world, takeover)
            assert differing([bits(output) for output in outputs], rest) == [], f"cached: {is_cached}"
            assert cached(outputs) == is_cached
        outputs = ask(world, probes())
        assert differing([bits(output) for output in outputs], case.alone) == []
        assert cached(outputs)


def cached(outputs: Sequence[Generated]) -> bool:
    return any(output.usage.cached_tokens > 0 for output in outputs)


def library_linear(x: Tensor | QuantisedRows, w: Linear, out_dtype: torch.dtype) -> Tensor:
    """One product of all rows: which instructions it takes depends on how many there are."""
    return linear(x.float(), w.w_NK).to(out_dtype)


def test_a_librarys_product_is_seen(
    model_dir: Path, quick_start: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = dataclasses.replace(KernelSet.reference(torch.float32), fp8_gemm=library_linear)
    monkeypatch.setattr("k2dist.engine.spec.select_kernels", lambda *_: kernels)
    case = Case(model_dir, Setting("library", "float32", 1))
    case.probe_alone()
    found = case.probe_in_company(ALONE)[-len(case.alone) :]
    assert differing(found, case.alone) != []
    assert tokens(found) == tokens(case.alone), "it is right, and not the same"


def test_a_librarys_reduction_is_seen(
    model_dir: Path, quick_start: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ring's: the sum of a row starts on the rank that its place in the batch gives it."""

    def ring(self: ThreadCommunicator, x_TD: Tensor, shares: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_rows, first = len(x_TD), sum(shares[: self.rank])
        addend_RTD = self.gather_rows(x_TD, [num_rows] * self.size).view(self.size, num_rows, -1)
        row_t = torch.arange(first, first + shares[self.rank])
        start_t = row_t * self.size // max(num_rows, 1)
        total_tD = torch.zeros(len(row_t), x_TD.shape[1])
        for turn in range(self.size):
            total_tD += addend_RTD[(start_t + turn) % self.size, row_t]
        return total_tD.to(dtype)

    monkeypatch.setattr(ThreadCommunicator, "reduce_rows", ring)
    case = Case(model_dir, Setting("reference", "float32", 4))
    case.probe_alone()
    found = case.probe_in_company(ALONE)[-len(case.alone) :]
    assert differing(found, case.alone) != []
    assert tokens(found) == tokens(case.alone), "it is right, and not the same"


def tokens(outputs: Sequence[Bits]) -> list[list[int]]:
    return [token_ids for token_ids, *_ in outputs]
