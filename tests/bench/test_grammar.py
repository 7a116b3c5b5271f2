"""`k2dist bench grammar`: every answer it walks is one that its constraint accepts."""

from __future__ import annotations

import json

import pytest

from k2dist.bench import grammar
from k2dist.errors import UsageError
from k2dist.grammar import Grammars
from k2dist.text.tokenizer import K2_SPECIALS, Tokenizer, end_token_ids


def test_the_answers_are_those_of_their_constraints() -> None:
    tokenizer = Tokenizer(
        [bytes([b]) for b in range(256)], {256 + i: name for i, name in K2_SPECIALS.items()}
    )
    grammars = Grammars(tokenizer, end_token_ids(tokenizer, None))
    for case in grammar._cases():
        for answer in case.answers:
            state = grammars.begin(case.constraint, tokenizer.encode(answer, allow_special=True))
            assert not state.error, (case.name, state.error)
            assert state.is_accepting, case.name


def test_times_are_of_all_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "_K2_VOCABULARY", 600)
    cost = grammar.measure(num_outputs=3, num_steps=5)
    assert (cost.vocabulary, cost.vocab_size, cost.num_outputs) == ("random", 856, 3)
    assert min(cost.mask_ms.mean, cost.mask_ms.p99, cost.step_ms.mean, cost.step_cpu_ms.mean) > 0
    assert all(one.compile_ms > 0 for one in cost.compiled)
    with pytest.raises(UsageError, match="--outputs=0"):
        grammar.measure(num_outputs=0)


def test_answers_come_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from k2dist.cli.bench import grammar as command

    monkeypatch.setattr(grammar, "_K2_VOCABULARY", 600)
    command(steps=2, outputs=2, as_json=True)
    assert json.loads(capsys.readouterr().out)["grammar"]["num_steps"] == 2
    command(steps=2, outputs=2)
    assert "one mask" in capsys.readouterr().out
