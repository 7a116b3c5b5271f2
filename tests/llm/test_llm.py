"""`LLM`: order, errors of one prompt and of all, memory, and the end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from k2dist.engine.forward import ForwardPass, Hidden, StagedBatch
from k2dist.errors import CheckpointError, ConfigError, LayoutError, PeerError, RequestError, UsageError
from k2dist.llm import LLM, Ask, Prompt, SamplingParams
from tests.llm.conftest import LIMITS, NUM_PAGES, PAGE_TOKENS, open_llm

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def threads_of_ranks() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("rank-")]


def all_pages_are_home(llm: LLM) -> bool:
    """Whether they are soon: a cancelled request's pages come back with the next plan."""
    give_up_s = time.monotonic() + 10
    while any(port.load().num_pages_free < NUM_PAGES for port in llm._world.ports):
        if time.monotonic() > give_up_s:
            return False
        time.sleep(0.01)
    return True


# -- answers ------------------------------------------------------------------------------------------


def test_more_prompts_than_lanes_hold_come_back_in_order(llm: LLM) -> None:
    prompts: list[Prompt] = [[i, *range(i % 30)] for i in range(30)]
    lengths = [SamplingParams(temperature=0.0, max_tokens=1 + 7 * i % 6, ignore_eos=True) for i in range(30)]
    assert len(prompts) > 2 * LIMITS.max_waiting, "more than both lanes would take at once"
    outputs = llm.generate(prompts, lengths)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.token_ids) for output in outputs] == [1 + 7 * i % 6 for i in range(30)]
    for i in (0, 17, 29):
        (alone,) = llm.generate([prompts[i]], lengths[i])
        assert alone.token_ids == outputs[i].token_ids
    assert all_pages_are_home(llm)


def test_text_is_encoded_as_it_is(llm: LLM) -> None:
    as_text, as_ids = llm.generate(["abc", [97, 98, 99]], GREEDY)
    assert as_text.prompt_token_ids == as_ids.prompt_token_ids == (97, 98, 99)
    assert as_text.outputs == as_ids.outputs
    assert as_text.usage.prompt_tokens == 3
    assert as_text.usage.completion_tokens == 4
    assert as_text.finish_reason == "length"
    assert as_text.logprobs is None
    assert as_text.prompt_logprobs is None


def test_chat_takes_one_conversation_or_many(llm: LLM) -> None:
    hello, bye = ([{"role": "user", "content": text}] for text in ("Hello", "Bye"))
    (one,) = llm.chat(hello, sampling=GREEDY)
    first, second = llm.chat([hello, bye], sampling=GREEDY)
    assert first.outputs == one.outputs
    assert second.prompt_token_ids != first.prompt_token_ids
    assert llm.chat([]) == []
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    (offered,) = llm.chat(hello, tools, GREEDY)
    assert len(offered.prompt_token_ids) > len(one.prompt_token_ids)


def test_n_outputs_differ_in_their_noise_alone(llm: LLM) -> None:
    sampling = SamplingParams(n=3, temperature=1.0, max_tokens=6, ignore_eos=True, seed=5)
    (three,) = llm.generate(["abc"], sampling)
    (again,) = llm.generate(["abc"], sampling)
    (one,) = llm.generate(["abc"], SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, seed=5))
    assert three.outputs == again.outputs
    assert len({output.token_ids for output in three.outputs}) == 3
    assert one.outputs == three.outputs[:1]
    assert (three.text, three.token_ids) == (one.text, one.token_ids)
    assert three.usage.completion_tokens == 18
    assert three.usage.prompt_tokens == 3


def test_more_outputs_than_run_at_a_time_wait(llm: LLM) -> None:
    (output,) = llm.generate(["a"], SamplingParams(n=LIMITS.max_waiting, max_tokens=3, ignore_eos=True))
    assert [len(one.token_ids) for one in output.outputs] == [3] * LIMITS.max_waiting


def test_logprobs_of_output_and_prompt(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate(["abcde"], sampling)
    assert output.logprobs is not None
    assert [one.token_id for one in output.logprobs] == list(output.token_ids)
    assert [one.top[0][0] for one in output.logprobs] == list(output.token_ids), "greedy takes the likeliest"
    assert output.prompt_logprobs is not None
    assert [one.token_id for one in output.prompt_logprobs] == list(b"bcde")
    assert all(len(one.top) == 1 for one in output.prompt_logprobs)


def test_what_runs_out_of_time_keeps_what_it_has(llm: LLM) -> None:
    endless = SamplingParams(n=2, temperature=0.0, ignore_eos=True, timeout_s=0.3)
    late, short = llm.generate(["abc", "abc"], [endless, GREEDY])
    assert [output.finish_reason for output in late.outputs] == ["timeout", "timeout"]
    assert late.error is None
    assert 0 < late.usage.completion_tokens < 2 * (PAGE_TOKENS * NUM_PAGES - 3)
    assert late.token_ids[:4] == short.token_ids
    assert short.finish_reason == "length"
    assert all_pages_are_home(llm)


def test_seeds_are_drawn_from_the_models_seed_in_order(tiny_model_dir: Path) -> None:
    sampling = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True)
    drawn = []
    for seed in (1, 1, 2):
        with open_llm(tiny_model_dir, lanes=1, seed=seed) as llm:
            outputs = llm.generate(["abc"] * 3, sampling)
            drawn.append([(output.sampling and output.sampling.seed, output.token_ids) for output in outputs])
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len({seed for seed, _ in drawn[0]}) == 3


def test_a_bar_is_shown_when_asked_for_or_on_a_terminal(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "", "b"], GREEDY)
    assert capsys.readouterr() == ("", "")
    llm.generate(["a", "", "b"], GREEDY, progress=True)
    out, err = capsys.readouterr()
    assert (out, "3/3" in err, "tokens/s" in err) == ("", True, True)


def test_loading_is_shown_when_asked_for(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # elsewhere a transient bar shows nothing
    with LLM(tiny_model_dir, lanes=2, progress=True):
        out, err = capsys.readouterr()
    assert out == ""
    assert "rank 2 of 2 tested" in err


# -- what cannot be answered --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ("", GREEDY, "prompt"),
        ([], GREEDY, "prompt"),
        ([1, 512], GREEDY, "prompt"),
        ([-1], GREEDY, "prompt"),
        ("x" * PAGE_TOKENS * NUM_PAGES, GREEDY, "prompt"),
        ("x", SamplingParams(max_tokens=PAGE_TOKENS * NUM_PAGES), "sampling.max_tokens"),
        ("x", SamplingParams(logit_bias={512: 1.0}), "sampling.logit_bias"),
        ("x", SamplingParams(stop_token_ids=[512]), "sampling.stop_token_ids[0]"),
        ("x", SamplingParams(n=LIMITS.max_waiting + 1, max_tokens=1), "sampling.n"),
    ],
)
def test_a_prompt_fails_alone_and_names_its_field(
    llm: LLM, prompt: Prompt, sampling: SamplingParams, field: str
) -> None:
    before, failed, after = llm.generate(["abc", prompt, "abc"], [GREEDY, sampling, GREEDY])
    assert failed.error is not None
    assert failed.error.field == field
    assert not str(failed.error).startswith(f"{field}: {field}")
    assert (failed.finish_reason, failed.text, failed.outputs) == ("error", "", ())
    assert before.error is None
    assert before.outputs == after.outputs
    with pytest.raises(RequestError):
        _ = failed.message


@pytest.mark.parametrize(
    ("prompts", "field"),
    [
        ("abc", "prompts"),
        (7, "prompts"),
        (["abc", 7], "prompts[1]"),
        ([b"abc"], "prompts[0]"),
        ([[1, 2.0]], "prompts[0][1]"),
        ([[True]], "prompts[0][0]"),
    ],
)
def test_what_is_no_prompt_is_refused_before_anything_runs(llm: LLM, prompts: list[str], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, GREEDY)
    assert caught.value.field == field


def test_samplings_must_be_one_for_each_prompt(llm: LLM) -> None:
    with pytest.raises(RequestError, match="1 for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lanes": 0}, ConfigError),
        ({"page_tokens": 48}, ConfigError),
        ({"num_pages": 0}, ConfigError),
        ({"kernels": "none"}, ConfigError),
        ({"dtype": "int8"}, ConfigError),
        ({"tp": 3}, LayoutError),
    ],
)
def test_a_model_that_cannot_be_opened_leaves_no_thread(
    tiny_model_dir: Path, options: dict[str, int], error: type[Exception]
) -> None:
    before = len(threads_of_ranks())
    with pytest.raises(error):
        LLM(tiny_model_dir, **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError):
        LLM(tiny_model_dir / "none")
    assert len(threads_of_ranks()) == before


# -- memory and order of a stream ---------------------------------------------------------------------


def test_asks_without_end_are_read_as_lanes_drain(llm: LLM) -> None:
    num_read = 0

    def asks() -> Iterator[Ask]:
        nonlocal num_read
        for i in count():
            num_read += 1
            yield Ask([i % 250], GREEDY)

    outputs = llm.iterate(asks())
    for i in range(30):
        assert next(outputs).prompt == [i % 250]
        assert num_read <= i + 2 + llm._window
    outputs.close()
    assert all_pages_are_home(llm)
    llm.generate(["a", "b"], GREEDY)
    assert not any(port.live() for port in llm._world.ports), "what has ended is forgotten"


def test_one_long_output_holds_back_no_more_than_the_window(llm: LLM) -> None:
    long = Ask([1], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    short = Ask([2], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    num_short = llm._window + 10
    outputs = list(llm.iterate([long] + [short] * num_short))
    assert [len(output.token_ids) for output in outputs] == [40] + [1] * num_short


def test_a_second_call_meanwhile_is_refused(llm: LLM) -> None:
    outputs = llm.iterate([Ask("a", GREEDY), Ask("b", GREEDY)])
    next(outputs)
    with pytest.raises(UsageError, match="at work"):
        llm.generate(["c"], GREEDY)
    outputs.close()
    assert llm.generate(["c"], GREEDY)[0].error is None


def test_an_error_of_the_asks_ends_what_is_under_way(llm: LLM) -> None:
    def asks() -> Iterator[Ask]:
        yield Ask("a", SamplingParams(max_tokens=400, ignore_eos=True))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(llm.iterate(asks()))
    assert all_pages_are_home(llm)


# -- the end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lanes", "tp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("error", [PeerError("rank 0 is late"), ZeroDivisionError("a bug")])
def test_a_failed_rank_ends_the_call_with_its_error(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, lanes: int, tp: int, error: Exception
) -> None:
    before = set(threads_of_ranks())
    with open_llm(tiny_model_dir, lanes=lanes, tp=tp) as llm:
        run, num_steps = ForwardPass.run, count()
        victim = llm._world.ranks[1]

        def break_down(passes: ForwardPass, staged: StagedBatch) -> Hidden:
            if passes._model is victim._model and next(num_steps) == 3:
                raise error
            return run(passes, staged)

        monkeypatch.setattr(ForwardPass, "run", break_down)
        started_s = time.monotonic()
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                llm.generate(["abc"] * 20, SamplingParams(max_tokens=50, ignore_eos=True))
            assert caught.value is error
        assert time.monotonic() - started_s < 30, "nobody waits for the step deadline"
    assert set(threads_of_ranks()) == before


def test_close_ends_all_threads_and_all_use(tiny_model_dir: Path) -> None:
    before = set(threads_of_ranks())
    llm = open_llm(tiny_model_dir)
    under_way = llm.iterate(Ask("a", GREEDY) for _ in count())
    next(under_way)
    llm.close()
    llm.close()
    assert set(threads_of_ranks()) == before
    with pytest.raises(UsageError, match="closed"):
        list(under_way)
    with pytest.raises(UsageError, match="closed"):
        llm.generate(["a"])


def test_a_forgotten_model_ends_its_threads(tiny_model_dir: Path) -> None:
    before = set(threads_of_ranks())
    llm = open_llm(tiny_model_dir)
    llm.generate(["a"], GREEDY)
    assert len(threads_of_ranks()) == len(before) + 2
    del llm
    gc.collect()
    assert set(threads_of_ranks()) == before


def test_a_program_may_end_without_close(tiny_model_dir: Path) -> None:
    program = f"""
import sys, k2dist
assert not {{"torch", "ray", "grpc", "msgspec"}} & sys.modules.keys(), "importing k2dist costs something"
llm = k2dist.LLM({str(tiny_model_dir)!r}, lanes=2)
assert not {{"ray", "grpc", "typer", "rich"}} & sys.modules.keys(), "LLM needs more than it should"
print(llm.generate(["a"], k2dist.SamplingParams(max_tokens=2, ignore_eos=True))[0].finish_reason)
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "length\n", "")
