"""Whatever is posted: an answer or a refusal in the API's form, never a fault of the server's."""

from __future__ import annotations

import asyncio
import json
import logging
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

values = st.recursive(
    st.sampled_from(VALUES) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A good body with some of it replaced, anywhere; or bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=50) | st.sampled_from(JUNK))
    body: Any = json.loads(json.dumps(draw(st.sampled_from(SEEDS))))
    for _ in range(draw(st.integers(0, 3))):
        place = body
        while place and draw(st.booleans()):  # go down
            inner = draw(st.sampled_from(list(place.values()) if isinstance(place, dict) else place))
            if not isinstance(inner, dict | list):
                break
            place = inner
        if isinstance(place, dict):
            place[draw(st.sampled_from([*place, *NAMES]))] = deepcopy(draw(values))  # it may be changed next
        else:
            place.append(deepcopy(draw(values)))
    return json.dumps(body).encode()


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens")


def test_no_body_is_the_servers_fault(
    model_dir: Any, config: ClusterConfig, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    lane = FakeLane(tokenizer)
    with asyncio.Runner() as runner:
        serving = run_http(config, model_dir, lane)
        server = runner.run(serving.__aenter__())

        @settings(max_examples=200, deadline=None, derandomize=True)
        @given(path=st.sampled_from(PATHS), body=bodies(), last_id=st.sampled_from(LAST_IDS))
        def post(path: str, body: bytes, last_id: str | None) -> None:
            headers = {} if last_id is None else {"Last-Event-ID": last_id}
            response = runner.run(server.http.post(path, content=body, headers=headers))
            assert response.status_code in (200, 400, 404), response.text
            if response.status_code != 200:
                error = response.json()["error"]
                assert error["message"]
                assert "Traceback" not in response.text
                assert error["type"] in ("invalid_request_error", "not_found_error")

        try:
            post()
            assert lane.num_pages_used == 0, "a page leaked"
            assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        finally:
            runner.run(serving.__aexit__(None, None, None))
