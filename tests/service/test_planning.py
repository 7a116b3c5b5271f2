"""The RPC `Plan` gives the object of `k2dist plan`, and the gauges set estimate beside measurement."""

from __future__ import annotations

import msgspec
import pytest

from k2dist._proto.v1 import control_pb2
from k2dist.config import read_architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.demo import MODEL_DIR
from k2dist.errors import LayoutError, RequestError
from k2dist.ids import LaneId
from k2dist.messages import LaneLoad
from k2dist.observe import ClusterState, RequestBook, StepPair
from k2dist.parallel import configured_layout
from k2dist.planner import ClusterPlan, StepModel, Workload, fitting_workload, plan_cluster
from k2dist.planner.beside import Beside
from k2dist.planner.site import configured_site
from k2dist.planner.work import LaneWork
from k2dist.service.http_metrics import HttpMetrics
from k2dist.text.tokenizer import Tokenizer
from tests.service.conftest import ARCHITECTURE, Serve
from tests.service.fake_lane import FakeLane

TP_3 = "name: other\nparallel: {lanes: 1, tp: 3}\n"


async def test_the_rpc_plans_the_cluster_that_runs(
    serve: Serve, tokenizer: Tokenizer, config: ClusterConfig
) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        response = await client.plan(control_pb2.PlanRequest())
        shorter = await client.plan(control_pb2.PlanRequest(prompt_len=100, output_len=7))
    found = msgspec.json.decode(response.json, type=ClusterPlan)
    workload = fitting_workload(config, ARCHITECTURE, Workload())
    assert found == plan_cluster(config, "tiny", ARCHITECTURE, workload)
    asked = msgspec.json.decode(shorter.json, type=ClusterPlan).estimate.workload
    assert (asked.prompt_len, asked.output_len) == (100, 7)


async def test_the_rpc_refuses_another_config_with_the_arithmetic(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        with pytest.raises(LayoutError, match="num_attention_heads 4 / 3 is not whole"):
            await client.plan(control_pb2.PlanRequest(config=TP_3))
        with pytest.raises(RequestError, match="target_tpot_s"):
            await client.plan(control_pb2.PlanRequest(target_tpot_s=-1.0))


def load(num_running: int, num_steps: int, num_used: int = 0) -> LaneLoad:
    return LaneLoad(
        lane=LaneId(0),
        num_running=num_running,
        num_waiting=0,
        num_pages=64,
        num_pages_free=64 - num_used,
        num_steps=num_steps,
    )


def demo_model() -> StepModel:
    architecture = read_architecture(MODEL_DIR)
    config = msgspec.convert({"name": "a", "parallel": {"lanes": 2, "tp": 1}}, ClusterConfig)
    return StepModel(configured_site(config, architecture, configured_layout(architecture, config.parallel)))


def test_measured_is_the_mean_step_between_two_looks_that_found_work() -> None:
    model = demo_model()
    beside = Beside(model, page_tokens=16)
    assert beside.note([load(0, 5), load(0, 5)], 10.0) is None, "idle"
    assert beside.note([load(4, 7, 8), load(2, 7)], 11.0) is None, "nothing before it"
    pair = beside.note([load(4, 107, 8), load(2, 107)], 13.0)
    assert pair is not None
    assert pair.measured_step_s == 2.0 / 100
    assert pair.measured_tokens_per_s == 6 / 0.02
    work = LaneWork(num_rows=4, own_rows=4, decode_rows=4, num_keys=8 * 16 / 4, prompt_rows=0)
    assert pair.estimated_step_s == model.step(work, 6).step_s
    assert beside.note([load(4, 107, 8), load(2, 107)], 14.0) is None, "it stands still: nothing is measured"
    assert beside.note([load(0, 110), load(0, 110)], 15.0) is None
    assert beside.note([load(1, 120), load(0, 120)], 16.0) is None, "it was idle in between"


def test_gauges_come_in_pairs_and_go_when_nothing_runs() -> None:
    step = StepPair(
        estimated_step_s=0.01, measured_step_s=0.02, estimated_tokens_per_s=200.0, measured_tokens_per_s=100.0
    )
    text = shown(step)
    assert 'k2dist_decode_step_seconds{model_name="demo",source="estimate"} 0.01' in text
    assert 'k2dist_decode_step_seconds{model_name="demo",source="measured"} 0.02' in text
    assert 'k2dist_decode_tokens_per_second{model_name="demo",source="measured"} 100.0' in text
    assert "source=" not in shown(None)


def shown(step: StepPair | None) -> str:
    state = ClusterState(
        cluster="a",
        model="demo",
        is_draining=False,
        num_queued=0,
        num_outputs=0,
        lanes=(),
        requests=RequestBook().facts(),
        step=step,
    )
    return HttpMetrics("demo").show(state).decode()
