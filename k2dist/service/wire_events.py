"""Events between our form and their protobuf form, both ways: the server writes, the client reads."""

from __future__ import annotations

from collections.abc import Callable

from k2dist._proto.v1 import inference_pb2 as pb
from k2dist.messages import Sampling, TokenLogprob, Usage
from k2dist.service.answer_events import (
    Accepted,
    AnswerEnd,
    AnswerEvent,
    Delta,
    Failed,
    Finished,
    PromptLogprobs,
    ToolCallDelta,
)

TokenBytes = Callable[[int], bytes]

_REASONS = {
    AnswerEnd.STOP: pb.FINISH_REASON_STOP,
    AnswerEnd.LENGTH: pb.FINISH_REASON_LENGTH,
    AnswerEnd.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
    AnswerEnd.ABORTED: pb.FINISH_REASON_ABORTED,
    AnswerEnd.TIMEOUT: pb.FINISH_REASON_TIMEOUT,
}
_ENDS = {reason: end for end, reason in _REASONS.items()}


def write_event(event: AnswerEvent, token_bytes: TokenBytes) -> pb.GenerateEvent:
    """`token_bytes` spells out the tokens of logprobs, for clients that have no tokenizer."""
    match event:
        case Accepted():
            return pb.GenerateEvent(accepted=_write_accepted(event))
        case PromptLogprobs():
            logprobs = (_write_logprob(logprob, token_bytes) for logprob in event.logprobs)
            scores = pb.PromptLogprobs(first_index=event.first_index, logprobs=logprobs)
            return pb.GenerateEvent(prompt_logprobs=scores)
        case Delta():
            message = pb.GenerateEvent()
            _write_delta(event, token_bytes, message.delta)
            return message
        case Finished():
            return pb.GenerateEvent(finished=_write_finished(event))
        case Failed():
            error = pb.Error(reason=event.reason, message=event.message, retryable=event.retryable)
            return pb.GenerateEvent(failed=pb.Failed(output_index=event.output_index, error=error))


def _write_accepted(event: Accepted) -> pb.Accepted:
    s = event.sampling
    sampling = pb.Sampling(
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        logit_bias=s.logit_bias,
        seed=s.seed,
        max_tokens=s.max_tokens,
        min_tokens=s.min_tokens,
        stop=s.stop,
        stop_token_ids=s.stop_token_ids,
        ignore_eos=s.ignore_eos,
        logprobs=s.logprobs,
        prompt_logprobs=s.prompt_logprobs,
    )
    return pb.Accepted(
        request_id=event.request_id,
        model=event.model,
        prompt_tokens=event.prompt_tokens,
        num_outputs=event.num_outputs,
        sampling=sampling,
        lane=event.lane,
    )


def _write_delta(event: Delta, token_bytes: TokenBytes, delta: pb.Delta) -> None:
    """In place, and only what there is: this is done for every token."""
    delta.output_index = event.output_index  # set even if 0, so that the delta counts as set
    delta.first_index = event.first_index
    delta.token_ids.extend(event.token_ids)
    delta.text = event.text
    for c in event.tool_calls:
        delta.tool_calls.add(index=c.index, id=c.id, name=c.name, arguments=c.arguments)
    delta.logprobs.extend([_write_logprob(logprob, token_bytes) for logprob in event.logprobs])


def _write_logprob(logprob: TokenLogprob, token_bytes: TokenBytes) -> pb.TokenLogprob:
    top = (pb.TopLogprob(token_id=i, logprob=value, token=token_bytes(i)) for i, value in logprob.top)
    token = token_bytes(logprob.token_id)
    return pb.TokenLogprob(token_id=logprob.token_id, logprob=logprob.logprob, token=token, top=top)


def _write_finished(event: Finished) -> pb.Finished:
    match event.stop_match:
        case None:
            stop_match = None
        case str(text):
            stop_match = pb.StopMatch(text=text)
        case token_id:
            stop_match = pb.StopMatch(token_id=token_id)
    usage = pb.Usage(
        prompt_tokens=event.usage.prompt_tokens,
        cached_tokens=event.usage.cached_tokens,
        completion_tokens=event.usage.completion_tokens,
    )
    reason = _REASONS[event.reason]
    return pb.Finished(output_index=event.output_index, reason=reason, stop_match=stop_match, usage=usage)


def read_event(message: pb.GenerateEvent, spelling: dict[int, bytes]) -> AnswerEvent | None:
    """None for an event that this client does not know, which is to be passed over.

    `spelling` is given the bytes of each token that comes with a logprob.
    """
    match message.WhichOneof("event"):
        case "accepted":
            return _read_accepted(message.accepted)
        case "prompt_logprobs":
            scores = message.prompt_logprobs
            logprobs = tuple(_read_logprob(logprob, spelling) for logprob in scores.logprobs)
            return PromptLogprobs(first_index=scores.first_index, logprobs=logprobs)
        case "delta":
            return _read_delta(message.delta, spelling)
        case "finished":
            return _read_finished(message.finished)
        case "failed":
            failed = message.failed
            return Failed(
                output_index=failed.output_index,
                reason=failed.error.reason,
                message=failed.error.message,
                retryable=failed.error.retryable,
            )
        case _:
            return None


def _read_accepted(message: pb.Accepted) -> Accepted:
    s = message.sampling
    sampling = Sampling(
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        logit_bias=dict(s.logit_bias),
        seed=s.seed,
        max_tokens=s.max_tokens,
        min_tokens=s.min_tokens,
        stop=tuple(s.stop),
        stop_token_ids=tuple(s.stop_token_ids),
        ignore_eos=s.ignore_eos,
        logprobs=s.logprobs if s.HasField("logprobs") else None,
        prompt_logprobs=s.prompt_logprobs if s.HasField("prompt_logprobs") else None,
    )
    return Accepted(
        request_id=message.request_id,
        model=message.model,
        prompt_tokens=message.prompt_tokens,
        num_outputs=message.num_outputs,
        sampling=sampling,
        lane=message.lane,
    )


def _read_delta(message: pb.Delta, spelling: dict[int, bytes]) -> Delta:
    calls = (
        ToolCallDelta(
            index=c.index,
            id=c.id if c.HasField("id") else None,
            name=c.name if c.HasField("name") else None,
            arguments=c.arguments,
        )
        for c in message.tool_calls
    )
    return Delta(
        output_index=message.output_index,
        first_index=message.first_index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        tool_calls=tuple(calls),
        logprobs=tuple(_read_logprob(logprob, spelling) for logprob in message.logprobs),
    )


def _read_logprob(message: pb.TokenLogprob, spelling: dict[int, bytes]) -> TokenLogprob:
    spelling[message.token_id] = message.token
    spelling.update((rival.token_id, rival.token) for rival in message.top)
    top = tuple((rival.token_id, rival.logprob) for rival in message.top)
    return TokenLogprob(token_id=message.token_id, logprob=message.logprob, top=top)


def _read_finished(message: pb.Finished) -> Finished:
    stop_match: str | int | None = None
    match message.stop_match.WhichOneof("match"):
        case "text":
            stop_match = message.stop_match.text
        case "token_id":
            stop_match = message.stop_match.token_id
    return Finished(
        output_index=message.output_index,
        reason=_ENDS.get(message.reason, AnswerEnd.STOP),
        stop_match=stop_match,
        usage=Usage(
            prompt_tokens=message.usage.prompt_tokens,
            cached_tokens=message.usage.cached_tokens,
            completion_tokens=message.usage.completion_tokens,
        ),
    )
