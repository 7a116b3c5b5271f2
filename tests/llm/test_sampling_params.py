"""`SamplingParams`: refused where it is written, resolved as the service resolves it."""

from pathlib import Path

import msgspec
import pytest

from k2dist.errors import RequestError
from k2dist.ids import RequestId
from k2dist.llm import Ask, SamplingParams
from k2dist.llm.ask import Prepare
from k2dist.messages import Sampling
from k2dist.scheduler import PartialSampling


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_k": 1.5}, "sampling.top_k"),
        ({"min_p": 2.0}, "sampling.min_p"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
        ({"presence_penalty": 3.0}, "sampling.presence_penalty"),
        ({"frequency_penalty": -3.0}, "sampling.frequency_penalty"),
        ({"logit_bias": {"a": 1.0}}, "sampling.logit_bias"),
        ({"logit_bias": {1: 101.0}}, "sampling.logit_bias[1]"),
        ({"seed": -1}, "sampling.seed"),
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "sampling.min_tokens"),
        ({"stop": ""}, "sampling.stop[0]"),
        ({"stop": ["a", 1]}, "sampling.stop[1]"),
        ({"stop_token_ids": [-1]}, "sampling.stop_token_ids[0]"),
        ({"logprobs": 21}, "sampling.logprobs"),
        ({"prompt_logprobs": -1}, "sampling.prompt_logprobs"),
        ({"n": 0}, "sampling.n"),
        ({"timeout_s": 0}, "sampling.timeout_s"),
        ({"timeout_s": float("nan")}, "sampling.timeout_s"),
        ({"timeout_s": "1"}, "sampling.timeout_s"),
        ({"timeout_s": True}, "sampling.timeout_s"),
        ({"n": True}, "sampling.n"),
    ],
)
def test_a_wrong_value_is_refused_where_it_is_written(said: dict[str, object], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**said)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_stop_string_need_not_be_a_list() -> None:
    assert SamplingParams(stop="end").partial() == PartialSampling(stop=("end",))
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1]).partial() == PartialSampling(
        stop=("a", "b"), stop_token_ids=(1,)
    )


def test_every_field_of_the_service_is_here() -> None:
    names = {*SamplingParams.__struct_fields__} - {"n", "timeout_s"}
    assert names == {*PartialSampling.__struct_fields__} == {*Sampling.__struct_fields__}


def test_what_is_left_open_is_the_models(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tiktoken.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    config = {"temperature": 0.25, "top_k": 9, "repetition_penalty": 1.25}
    (tmp_path / "generation_config.json").write_bytes(msgspec.json.encode(config))
    prepare = Prepare(tmp_path, page_tokens=16, num_pages=4, draw_seed=lambda: 7)
    open_one = prepare.request(RequestId("a"), Ask("abc"))
    assert open_one.sampling == Sampling(
        temperature=0.25, top_k=9, repetition_penalty=1.25, seed=7, max_tokens=61
    )
    said = prepare.request(RequestId("b"), Ask("abc", SamplingParams(temperature=0.0, top_k=0, seed=0, n=2)))
    assert (said.sampling.temperature, said.sampling.top_k, said.sampling.seed) == (0.0, 0, 0)
    assert said.num_outputs == 2


def test_a_prompt_longer_than_the_context_is_refused(prepare: Prepare) -> None:
    with pytest.raises(RequestError, match="the context holds 131072") as caught:
        prepare.request(RequestId("a"), Ask([1] * 131072))
    assert caught.value.field == "prompt"
