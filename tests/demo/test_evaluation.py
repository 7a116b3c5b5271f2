"""All held-out weather questions, in this process with the served arithmetic; e2e asks 20 over gRPC."""

import pytest

from k2dist.demo import MODEL_DIR
from k2dist.demo.chats import LocalChat
from k2dist.demo.evaluate import failures, held_out_cases, run_cases


@pytest.mark.slow
def test_the_demo_model_calls_and_answers_on_what_it_never_saw() -> None:
    outcomes = run_cases(held_out_cases(num_weather=200, num_others=0), LocalChat(MODEL_DIR))
    assert sum(outcome.is_called is True for outcome in outcomes) >= 190, failures(outcomes)
    assert sum(outcome.is_answered for outcome in outcomes) >= 185, failures(outcomes)
