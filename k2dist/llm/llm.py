"""`LLM`: a model in this process, for prompts by the thousand.

asks ── Prepare ──> requests ── Feed, as lanes drain ──> lanes (threads) ──> outputs, in the order of the asks
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Literal, Self

from k2dist.config import read_architecture
from k2dist.engine import Feed, Generated, LocalWorld
from k2dist.errors import CapacityError, ConfigError, RequestError, UsageError
from k2dist.ids import RequestId
from k2dist.llm.ask import Ask, Prepare, Prompt, check_prompt
from k2dist.llm.conversation import Conversation, read_chats
from k2dist.llm.output import Output, answered
from k2dist.llm.progress import loading_bar, progress_bar
from k2dist.llm.sampling_params import SamplingParams
from k2dist.messages import FinishReason, Request
from k2dist.parallel import first_layout
from k2dist.scheduler import Limits

_WAIT_S = 0.05  # for the next event of any lane
# Prompts taken and not yet given back, per output that the lanes may have under way: what has ended waits for
# its turn behind a longer one, and the lanes go on meanwhile.
_WINDOW = 4

_SAID = {"num_outputs": "sampling.n"}  # what lanes call otherwise


class LLM:
    """A model, loaded and ready. `close` it, or use it as a context; left open it ends with the interpreter.

    model_dir: a checkpoint as Moonshot publishes it. lanes, tp: ranks are lanes x tp threads; more than one
    of either is for trying a layout, one is the fastest here. device: "cpu", or "cuda" for this process's
    first. kernels: "auto", "native", "triton" or "reference".
    dtype: of the residual stream, "bfloat16" or "float32" (slow, for comparisons). Each lane has `num_pages`
    pages of `page_tokens` tokens, and `limits` of its own. seed: where the seeds of prompts that give none
    are drawn from, in their order; None: from chance. step_deadline_s: what a rank waits for others in one
    exchange. progress: show on stderr how far loading is; None: on a terminal.

    Errors: CheckpointError, ConfigError, LayoutError, FaultyRankError. One call at a time: a second one is a
    UsageError. When a rank fails, the call under way and all later ones raise what the rank raised.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        lanes: int = 1,
        tp: int = 1,
        device: Literal["cpu", "cuda"] = "cpu",
        kernels: str = "auto",
        dtype: str = "bfloat16",
        page_tokens: int = 64,
        num_pages: int = 256,
        limits: Limits | None = None,
        seed: int | None = None,
        step_deadline_s: float = 600.0,
        progress: bool | None = None,
    ) -> None:
        path, limits = Path(model_dir), limits or Limits()
        for name, value in (("lanes", lanes), ("tp", tp), ("step_deadline_s", step_deadline_s)):
            if value <= 0:
                raise ConfigError(f"{name}={value}: must be more than 0")
        world = LocalWorld(
            path,
            first_layout(read_architecture(path), lanes=lanes, tp=tp),
            limits=limits,
            page_tokens=page_tokens,
            num_pages=num_pages,
            device=device,
            kernels=kernels,
            dtype=dtype,
            step_deadline_s=step_deadline_s,
            retain_s=0.0,  # nobody asks again for what has ended
        )
        self._prepare = Prepare(
            path,
            page_tokens=page_tokens,
            num_pages=num_pages,
            draw_seed=partial(secrets.randbits if seed is None else Random(seed).getrandbits, 64),
        )
        self._world = world
        self._lane_outputs = min(limits.max_waiting, 2 * limits.max_running)
        self._window = _WINDOW * lanes * self._lane_outputs
        self._request_ids = map(RequestId, map(str, count()))
        self._turn = threading.Lock()
        with loading_bar(world.layout.world_size, is_shown=progress) as tell:
            world.start(tell)
        self._closing = weakref.finalize(self, world.close)  # at the interpreter's end too

    def close(self) -> None:
        """End all threads and free the model; a call under way ends with a UsageError. Twice does no harm."""
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Output]:
        """One output per prompt, in their order. `sampling`: for all, or one for each.

        A prompt that cannot be answered (empty, too long, ids or sampling that the model has not) gets an
        output with an `error`; the others go on. RequestError, before anything runs, for what is no prompt.
        A rank's failure is raised, and ends all.
        progress: show a bar on stderr; None: on a terminal.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise RequestError("prompts", f"a {type(prompts).__name__}; give a list of prompts")
        for i, prompt in enumerate(prompts):
            check_prompt(prompt, f"prompts[{i}]")
        asks = map(Ask, prompts, _samplings(sampling, len(prompts)))
        with progress_bar(len(prompts), is_shown=progress) as show:
            outputs = []
            for output in self.iterate(asks):
                outputs.append(output)
                show(output)
            return outputs

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        tools: Sequence[Mapping[str, Any]] = (),
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Output]:
        """The assistant's next message in one conversation, or in each of a list; always a list of outputs.

        Messages are dicts in OpenAI's form or `ChatMessage`. `tools`, OpenAI's function tools, are offered in
        all conversations; without any nothing is taken for a tool call. Otherwise as `generate`.
        """
        return self.generate(read_chats(messages, tools), sampling, progress=progress)

    def iterate(self, asks: Iterable[Ask]) -> Iterator[Output]:
        """As `generate`, for any number of asks: they are read as lanes drain, and outputs given back in
        order as they end, so that neither all prompts nor all outputs are in memory. Leaving it early
        (`close` of the generator, or an error) ends what is under way.
        """
        self._check_open()
        if not self._turn.acquire(blocking=False):
            raise UsageError("this LLM is at work on another call; wait for it, or make a second LLM")
        feed = Feed(self._world.ports, lane_outputs=self._lane_outputs)
        try:
            yield from self._run(iter(asks), feed)
        except CapacityError:  # lanes are never overfilled here, so one has failed
            self._world.raise_failure()
        finally:
            feed.cancel()
            self._turn.release()

    def _run(self, asks: Iterator[Ask], feed: Feed) -> Iterator[Output]:
        pending: deque[_Pending] = deque()  # in order; all but perhaps the last one are with a lane
        while True:
            has_more = self._fill(pending, asks, feed)
            while pending and pending[0].has_ended:
                yield self._output(pending.popleft())
            if not pending and not has_more:
                return
            feed.wait(_WAIT_S)
            self._check_open()

    def _fill(self, pending: deque[_Pending], asks: Iterator[Ask], feed: Feed) -> bool:
        """Take asks while lanes and window have room; false once there are no more."""
        while not pending or pending[-1].start(feed):
            if len(pending) >= self._window:
                return True
            ask = next(asks, None)
            if ask is None:
                return False
            check_prompt(ask.prompt, "prompt")
            pending.append(self._pending(ask))
        return True

    def _pending(self, ask: Ask) -> _Pending:
        try:
            return _Pending(ask, self._prepare.request(next(self._request_ids), ask))
        except RequestError as error:
            return _Pending(ask, None, error=error)

    def _output(self, ended: _Pending) -> Output:
        if ended.request is None or ended.error is not None:
            return Output(prompt=ended.ask.prompt, error=ended.error)
        if any(output.finish is FinishReason.ERROR for output in ended.generated):
            if any(port.has_failed for port in self._world.ports):
                self._world.raise_failure()
            error = next(output.error for output in ended.generated if output.error)
            return Output(prompt=ended.ask.prompt, error=RequestError("", error))
        return answered(ended.ask, ended.request, ended.generated, self._prepare)

    def _check_open(self) -> None:
        if not self._closing.alive:
            raise UsageError("this LLM is closed; make a new one")


@dataclass(slots=True)
class _Pending:
    """An ask on its way: refused (`error`), waiting (nothing generated), or with a lane."""

    ask: Ask
    request: Request | None
    generated: Sequence[Generated] = ()
    error: RequestError | None = None

    @property
    def has_ended(self) -> bool:
        if self.error is not None:
            return True
        return bool(self.generated) and all(output.finish is not None for output in self.generated)

    def start(self, feed: Feed) -> bool:
        """Give it to a lane unless it has one or was refused; false while all lanes are full."""
        if self.request is None or self.generated or self.error is not None:
            return True
        lane = feed.room(self.request.num_outputs)
        if lane is None:
            return False
        try:
            self.generated = feed.put(self.request, lane)
        except RequestError as error:
            self.error = RequestError(_SAID.get(error.field, error.field), error.message)
        return True


def _samplings(
    sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if sampling is None:
        return [SamplingParams()] * num_prompts
    if isinstance(sampling, SamplingParams):
        return [sampling] * num_prompts
    if len(sampling) != num_prompts:
        raise RequestError(
            "sampling", f"{len(sampling)} for {num_prompts} prompts; give one for each, or one"
        )
    strange = next((i for i, each in enumerate(sampling) if not isinstance(each, SamplingParams)), None)
    if strange is not None:
        raise RequestError(
            f"sampling[{strange}]", f"a {type(sampling[strange]).__name__}; give SamplingParams"
        )
    return sampling
