"""A whole coordinator over fake lanes, on a free port, with a model directory of a tokenizer and no weights.

Tests here may be coroutines: each gets an event loop of its own and 20 seconds, a slow one 5 minutes.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from k2dist.config import Architecture
from k2dist.config.cluster import CacheConfig, ClusterConfig, ParallelConfig, SchedulerConfig, ServiceConfig
from k2dist.service.client import AsyncClient
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.text.tokenizer import K2_SPECIALS, Tokenizer
from tests.published_config import published_config
from tests.service.fake_lane import FakeLane
from tests.service.http_server import HttpServer, ServeHttp, run_http

NUM_BASE = 256  # the bytes; 256 specials follow
ARCHITECTURE = Architecture(
    model_type="kimi_k2",
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    intermediate_size=256,
    moe_intermediate_size=128,
    num_experts=12,
    num_shared_experts=1,
    top_k=3,
    first_dense_layers=1,
    num_groups=1,
    top_k_groups=1,
    norm_top_k=True,
    routed_scale=2.827,
    rms_norm_eps=1e-6,
    rope_theta=50000.0,
    yarn=None,
    max_positions=2048,
    vocab_size=NUM_BASE + 256,
    bos_token_id=NUM_BASE,
    eos_token_ids=(NUM_BASE + 1,),
    scale_block=128,
)

Serve = Callable[..., AbstractAsyncContextManager[AsyncClient]]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test to its end."""
    if not inspect.iscoroutinefunction(pyfuncitem.function):
        return None
    names = inspect.signature(pyfuncitem.function).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    timeout_s = 20 if pyfuncitem.get_closest_marker("slow") is None else 300
    asyncio.run(asyncio.wait_for(pyfuncitem.function(**arguments), timeout_s))
    return True


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("models") / "tiny"
    model_dir.mkdir()
    (model_dir / "config.json").write_text(json.dumps(published_config(ARCHITECTURE)))
    (model_dir / "generation_config.json").write_text(
        json.dumps({"eos_token_id": NUM_BASE + 2, "temperature": 0.25})
    )
    ranks = (f"{base64.b64encode(bytes((byte,))).decode()} {byte}\n" for byte in range(NUM_BASE))
    (model_dir / "tiktoken.model").write_text("".join(ranks))
    specials = {str(NUM_BASE + offset): {"content": name} for offset, name in K2_SPECIALS.items()}
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": specials}))
    return model_dir


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


@pytest.fixture
def config() -> ClusterConfig:
    return ClusterConfig(
        name="test",
        parallel=ParallelConfig(lanes=1, tp=1),
        cache=CacheConfig(page_tokens=16, num_pages=64),
        scheduler=SchedulerConfig(),
        service=ServiceConfig(grpc="127.0.0.1:0"),
    )


@pytest.fixture
def serve(model_dir: Path, config: ClusterConfig) -> Serve:
    """`async with serve(lane, ...) as client`: a running coordinator over these lanes and a client of it.

    `changed` replaces the config.
    """

    @asynccontextmanager
    async def run(*lanes: FakeLane, changed: ClusterConfig | None = None) -> AsyncIterator[AsyncClient]:
        actor = CoordinatorActor(changed or config, model_dir, lanes)
        address = await actor.start()
        for lane in lanes:
            lane.start()
        try:
            async with AsyncClient(address) as client:
                yield client
        finally:
            await actor.stop()
            for lane in lanes:
                await lane.stop()

    return run


@pytest.fixture
def serve_http(model_dir: Path, config: ClusterConfig) -> ServeHttp:
    """`async with serve_http(lane, ...) as server`: the same, with a gateway before it."""

    def run(
        *lanes: FakeLane, changed: ClusterConfig | None = None
    ) -> AbstractAsyncContextManager[HttpServer]:
        return run_http(changed or config, model_dir, *lanes)

    return run
