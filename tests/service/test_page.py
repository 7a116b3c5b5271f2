"""The page at / in a real browser: a question is typed, the streamed answer is read, the cluster is drawn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from k2dist.config.cluster import ClusterConfig
from k2dist.text.tokenizer import IM_END, Tokenizer
from tests.service.browser import CHROMIUM, open_page
from tests.service.fake_lane import FakeLane
from tests.service.fake_world import FakeWorld
from tests.service.http_clients import two_calls
from tests.service.test_observe import serving

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


class Served:
    """A gateway in a thread of its own, as the browser blocks this one. Its lane takes 10 ms a token."""

    def __init__(self, config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer) -> None:
        self.world = FakeWorld()
        self.url = ""
        self._parts = (config, model_dir, tokenizer)
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._done = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    async def _serve(self) -> None:
        config, model_dir, tokenizer = self._parts
        async with AsyncExitStack() as stack:
            lane = FakeLane(tokenizer, step_s=0.01)
            self.lane = lane
            http, _ = await stack.enter_async_context(serving(config, model_dir, self.world, lane))
            self.url = str(http.base_url).rstrip("/")
            self._ready.set()
            await self._done.wait()

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def served(config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer) -> Iterator[Served]:
    with Served(config, model_dir, tokenizer) as served:
        yield served


def test_the_page_may_load_nothing_from_elsewhere(served: Served) -> None:
    for path in ("/", "/page/chat.js", "/page/page.css"):
        response = httpx.get(served.url + path)
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert policy.startswith(
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"
        )
        assert "unsafe" not in policy
        assert "http://" not in response.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in response.text
    assert httpx.get(served.url + "/page/../http_app.py").status_code == 404


@browser
def test_a_question_is_typed_and_its_answer_read(served: Served, tmp_path: Path) -> None:
    with open_page(tmp_path / "profile") as page:
        page.open(served.url)
        page.await_that("document.getElementById('served').textContent === 'tiny'")
        page.await_that("document.activeElement.id === 'question'")
        page.type("Say the alphabet")
        page.press("Enter", 13)
        answer = "document.querySelector('.message.assistant .text')?.textContent ?? ''"
        page.await_that(f"({answer}).length > 0")
        seen = page.value(answer)
        assert ALPHABET.startswith(seen), "it streams"
        page.await_that(f"({answer}) === {ALPHABET!r}")
        page.await_that("document.querySelector('.message.assistant').getAttribute('aria-busy') === 'false'")
        assert page.value("document.querySelector('.message.user .text').textContent") == "Say the alphabet"
        page.await_that("document.getElementById('status').textContent === 'ready'")
        page.await_that("document.querySelectorAll('.ranks li').length === 2")
        page.await_that(
            "document.getElementById('phase').textContent === 'test · running · generation 3 · 2 recoveries'"
        )
        page.value("document.getElementById('span').value = 'all'")
        page.value("document.getElementById('span').dispatchEvent(new Event('change'))")
        heat = "document.getElementById('heat-text').textContent"
        assert page.value(heat) == "Busiest: MoE layer 0, rank 0: 40 rows, 1.33 times the average."
        page.value("document.getElementById('heat').focus()")
        page.press("ArrowDown", 40)
        page.await_that(f"({heat}).startsWith('MoE layer 0, rank 1: 20 rows, 0.67')")
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        assert page.complaints() == []


@browser
def test_a_hang_is_told_on_the_page(served: Served, tmp_path: Path) -> None:
    served.world.late_s = 40.0
    with open_page(tmp_path / "profile") as page:
        page.open(served.url)
        page.await_that("document.getElementById('status').textContent === 'unwell'")
        assert "rank 1 is late" in page.value("document.getElementById('trouble').textContent")
        page.await_that("document.querySelector('.ranks li.bad')?.textContent === 'rank 1, late'")


@browser
def test_calls_of_tools_are_shown_and_their_results_go_back(
    served: Served, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    answers = [two_calls(tokenizer), [*b"Done.", tokenizer.special_id(IM_END)]]
    served.lane._script = lambda prompt: answers[b"Return of" in bytes(t for t in prompt if t < 256)]
    with open_page(tmp_path / "profile") as page:
        page.open(served.url)
        page.await_that("document.getElementById('served').textContent === 'tiny'")
        page.value("document.getElementById('example').click()")
        page.value("document.getElementById('question').focus()")
        page.type("And the weather?")
        page.press("Enter", 13)
        page.await_that("document.querySelectorAll('.call form').length === 2")
        calls = "[...document.querySelectorAll('.call')]"
        shown = page.value(f"{calls}.map(call => call.querySelector('p').innerText)")
        assert shown == ["calls get_weather"] * 2
        shown = page.value(f"{calls}.map(call => call.querySelector('pre').innerText)")
        assert shown == ['{"city": "Rome"}', '{"city": "Zürich"}']
        for result in ("sunny", "foggy"):  # the first one has the focus
            page.value("document.querySelector('.call input').focus()")
            page.type(result)
            page.press("Enter", 13)
        page.await_that("document.querySelectorAll('.message.assistant')[1]?.innerText.includes('Done.')")
        page.screenshot(tmp_path / "calls.png")
        assert page.complaints() == []
