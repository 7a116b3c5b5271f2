"""Whatever is posted: an answer or a refusal in the API's form, never a fault of the server's."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.config.cluster import ClusterConfig
from k2dist.text.tokenizer import Tokenizer
from tests.service.fake_lane import FakeLane
from tests.service.http_clients import HELLO, WEATHER
from tests.service.http_server import run_http

NAMES = tuple(
    """messages model stream stream_options n max_tokens max_completion_tokens temperature top_p top_k
    min_p stop seed logprobs top_logprobs logit_bias tools tool_choice parallel_tool_calls
    response_format prompt echo suffix best_of system stop_sequences thinking output_config detached
    user role content type text name tool_calls tool_call_id function arguments parameters id partial
    input input_schema tool_use_id is_error include_usage json_schema schema""".split()  # noqa: SIM905 - one a line would be a page
)
KINDS = ("user", "assistant", "tool", "auto", "function", "text", "tool_use", "tool_result", "json_schema")
NUMBERS = (0, 1, -1, 2**31, 2**64, 1e400, 0.5, float("nan"))
VALUES = (None, True, "", "a", "\ud800", "<|im_end|>", [], {}, *KINDS, *NUMBERS)
JUNK = (b"[" * 100_000, b'{"a":' * 50_000, b"null", b"{}")
LAST_IDS = (None, None, None, "", "a", "msg_:0:0:0")
SEEDS: tuple[dict[str, Any], ...] = (
    {"messages": HELLO, "max_tokens": 2, "n": 1, "stop": ["b"], "logit_bias": {"97": 1}, "seed": 1},
    {"messages": HELLO, "max_tokens": 2, "tools": [WEATHER], "tool_choice": "auto", "stream": True},
    {"prompt": ["a", [98]], "max_tokens": 2, "logprobs": 1, "echo": True, "temperature": 0.5},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "i", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "i", "content": "1"}]},
        ],
        "max_tokens": 2,
        "system": [{"type": "text", "text": "s"}],
    },
)


def value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(6 if depth < 3 else 4)
    if kind < 3:
        return draw.choice(VALUES)
    if kind == 3:
        return "".join(chr(draw.choice((draw.randrange(128), draw.randrange(0xD7FF)))) for _ in range(5))
    if kind == 4:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(NAMES): value(draw, depth + 1) for _ in range(draw.randrange(5))}


def body(draw: random.Random) -> bytes:
    """A good body with some of it replaced, anywhere; or bytes."""
    if draw.randrange(10) == 0:
        return draw.choice((*JUNK, draw.randbytes(draw.randrange(50))))
    made: Any = deepcopy(draw.choice(SEEDS))
    for _ in range(draw.randrange(4)):
        place = made
        while place and draw.randrange(2):  # go down
            inner = draw.choice(list(place.values()) if isinstance(place, dict) else place)
            if not isinstance(inner, dict | list):
                break
            place = inner
        if isinstance(place, dict):
            place[draw.choice([*place, *NAMES])] = deepcopy(value(draw))  # it may be changed next
        else:
            place.append(deepcopy(value(draw)))
    return json.dumps(made).encode()


AT_ONCE = 10
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens")


@pytest.mark.parametrize("num_inputs", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_body_is_the_servers_fault(
    num_inputs: int,
    model_dir: Any,
    config: ClusterConfig,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lane = FakeLane(tokenizer)
    with asyncio.Runner() as runner:
        serving = run_http(config, model_dir, lane)
        server = runner.run(serving.__aenter__())

        async def post(draw: random.Random) -> None:
            last_id = draw.choice(LAST_IDS)
            headers = {} if last_id is None else {"Last-Event-ID": last_id}
            response = await server.http.post(draw.choice(PATHS), content=body(draw), headers=headers)
            assert response.status_code in (200, 400, 404), response.text
            if response.status_code != 200:
                error = response.json()["error"]
                assert error["message"]
                assert "Traceback" not in response.text
                assert error["type"] in ("invalid_request_error", "not_found_error")

        async def post_some(seed: int) -> None:
            draws = [random.Random(f"{seed} {number}") for number in range(AT_ONCE)]
            await asyncio.gather(*map(post, draws))

        # Hypothesis draws no more than a seed: drawing bodies itself takes it 20 times what answering takes.
        @settings(max_examples=num_inputs // AT_ONCE, deadline=None, derandomize=True)
        @given(seed=st.integers(0, 2**32 - 1))
        def post_all(seed: int) -> None:
            runner.run(post_some(seed))

        try:
            post_all()
            assert lane.num_pages_used == 0, "a page leaked"
            assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        finally:
            runner.run(serving.__aexit__(None, None, None))
