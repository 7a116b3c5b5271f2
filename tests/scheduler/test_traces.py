"""Readable transcripts in traces/*.txt: each is a script of `>` lines and what the lane did.

After a change that is meant, write them anew and read the difference:  python tests/scheduler/test_traces.py
"""

import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from k2dist.messages import Event, Request, Sampling, StepPlan
from k2dist.scheduler import Limits

TRACES = sorted((Path(__file__).parent / "traces").glob("*.txt"))


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_transcript(path: Path, fake_lane: type) -> None:
    text = path.read_text()
    assert transcribe(text, fake_lane) == text


def test_transcripts_are_found() -> None:
    assert len(TRACES) >= 11


def transcribe(text: str, fake_lane: type) -> str:
    """The script in `text` (comments, settings, `>` lines) with the lane's doings written under each line."""
    lines: list[str] = []
    lane = None
    for line in text.splitlines():
        if line.startswith("#") or not line:
            lines.append(line)
        elif line.startswith("limits "):
            lane = _begin(line, fake_lane)
            lines.append(line)
        elif line.startswith("> "):
            lines.append(line)
            verb, *words = line.removeprefix("> ").split()
            events: tuple[Event, ...] = ()
            if verb == "add":
                lane.add(_request(*words))
            elif verb == "abort":
                events = lane.scheduler.abort(words[0])
                lane.take(events)
            elif verb == "wait":
                lane.now_s += float(words[0])
            elif verb in ("plan", "step"):
                plan = lane.plan(prefill="decode" not in words)
                lines += _describe_plan(plan)
                if verb == "step" and plan.grants:
                    events = lane.commit()
            elif verb == "commit":
                events = lane.commit()
            else:
                assert verb == "lose", f"{line}: add, abort, wait, plan, commit, step or lose"
                lane.lose_pages()
            lines += [_describe_event(event) for event in events]
            lines.append(_describe_load(lane))
    return "\n".join(lines) + "\n"


def _begin(line: str, fake_lane: type):
    numbers = _numbers(line.split()[1:])
    num_pages, page_tokens = numbers.pop("num_pages"), numbers.pop("page_tokens")
    return fake_lane(Limits(**numbers), num_pages=num_pages, page_tokens=page_tokens)


def _request(name: str, *words: str) -> Request:
    """`add NAME prompt=N max_tokens=N [shared=N] [like=NAME] [tenant=T] [timeout_s=N] [priority=N] ...`.

    It does not stop before max_tokens. The first `shared` tokens of its prompt are those of all such prompts,
    the others those of the request that it is like.
    """
    texts = {"tenant": "", "like": name}
    texts |= dict(word.split("=") for word in words if word.split("=")[0] in texts)
    numbers = _numbers(word for word in words if word.split("=")[0] not in texts)
    num_shared, num_tokens = numbers.pop("shared", 0), numbers.pop("prompt")
    return Request(
        request_id=name,
        prompt=prompt_of("", num_shared) + prompt_of(texts["like"], num_tokens - num_shared),
        tenant=texts["tenant"],
        sampling=Sampling(max_tokens=numbers.pop("max_tokens"), ignore_eos=True),
        **numbers,
    )


def prompt_of(name: str, num_tokens: int) -> tuple[int, ...]:
    """Tokens 1 to 11, for each name others."""
    digits = zlib.crc32(name.encode())
    return tuple(1 + digits // 11 ** (i % 9) % 11 for i in range(num_tokens))


def _numbers(words: Iterable[str]) -> dict[str, int]:
    return {name: int(number) for name, number in (word.split("=") for word in words)}


def _describe_plan(plan: StepPlan) -> list[str]:
    lines = [f"    step {plan.step}"]
    if plan.released:
        lines.append(f"      released   {' '.join(map(str, plan.released))}")
    for new in plan.new:
        known = f"{len(new.prompt)} prompt" + (f", {len(new.generated)} generated" if new.generated else "")
        (start,) = (grant.start for grant in plan.grants if grant.seq_id == new.seq_id)
        known += f", {start} cached" if start else ""
        lines.append(f"      new        {new.seq_id}: {new.request_id}/{new.output_index}, {known}")
    for table in plan.page_tables:
        lines.append(f"      pages      {table.seq_id}: [{table.first}:] = {' '.join(map(str, table.pages))}")
    for grant in plan.grants:
        samples = " samples" if grant.samples else ""
        lines.append(
            f"      grant      {grant.seq_id}: [{grant.start}, {grant.start + grant.num_tokens}){samples}"
        )
    return lines


def _describe_event(event: Event) -> str:
    before = f"after token {event.first_index - 1}" if event.first_index else "before its first token"
    delta = f"token {event.first_index}" if event.token_ids else before
    end = f", {event.finish}" if event.finish else ""
    return f"    {event.request_id}/{event.output_index}: {delta}{end}" + (
        f": {event.error}" if event.error else ""
    )


def _describe_load(lane) -> str:
    load = lane.scheduler.load(0)
    cached = f", {load.num_pages_cached} of them cached" if load.num_pages_cached else ""
    numbers = f"{load.num_running} running, {load.num_waiting} waiting, {load.num_pages_free} pages free"
    return f"    {numbers}{cached}"


def _rewrite() -> None:
    from conftest import FakeLane  # the one beside this file, which is run as a script

    for path in TRACES:
        kept = [line for line in path.read_text().splitlines() if not line.startswith(" ")]
        path.write_text(transcribe("\n".join(kept), FakeLane))


if __name__ == "__main__":
    _rewrite()
