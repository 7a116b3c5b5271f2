"""Every value that crosses a process border, frozen and strict (msgspec; msgpack on the wire).

Token ids are plain ints, 0 <= id < vocab_size. A position in a request's output is the pair
(output_index, token_index); events carry `first_index`, so they may be cut anywhere and stay gapless.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from k2dist.ids import Generation, LaneId, PageId, RequestId, SeqId


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all messages. Subclasses repeat `frozen` and `kw_only`, which msgspec does not hand down."""


class FinishReason(enum.StrEnum):
    """Why an output ended."""

    STOP = "stop"  # an end token, a stop id or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # the client or an operator ended it
    TIMEOUT = "timeout"  # the request's `timeout_s` has passed; `Event.error` says what to do
    ERROR = "error"  # k2dist could not go on; `Event.error` says why


class ToolCall(Message, frozen=True, kw_only=True):
    """One call in an assistant message. `arguments` is JSON text, verbatim, or an object to be dumped."""

    id: str
    name: str
    arguments: str | dict[str, Any]


class ChatMessage(Message, frozen=True, kw_only=True):
    """One message of a conversation. Content parts are joined by whoever parses the client's form."""

    role: str  # "system", "user", "assistant", "tool", or another that is rendered as a system label
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class JsonSchema(Message, frozen=True, kw_only=True, tag="json_schema"):
    """JSON that satisfies a schema. `schema`: JSON text; properties come in its order."""

    schema: str


class JsonObject(Message, frozen=True, kw_only=True, tag="json_object"):
    """Any JSON object."""


class Regex(Message, frozen=True, kw_only=True, tag="regex"):
    """The whole answer matches `pattern`, in the syntax of Rust's regex crate, without look-around."""

    pattern: str


class Choice(Message, frozen=True, kw_only=True, tag="choice"):
    """The answer is one of `choices`, to the letter."""

    choices: tuple[str, ...]


class Lark(Message, frozen=True, kw_only=True, tag="lark"):
    """EBNF: a context-free grammar in llguidance's form of Lark's syntax, with a rule `start`."""

    grammar: str


TextConstraint = JsonSchema | JsonObject | Regex | Choice | Lark


class CallableTool(Message, frozen=True, kw_only=True):
    """`parameters`: the JSON schema of a call's arguments, as JSON text; None: any JSON object."""

    name: str
    parameters: str | None = None


class ToolCalls(Message, frozen=True, kw_only=True, tag="tool_calls"):
    """Tool calls in K2's form: a call names one of `tools` and its arguments satisfy that tool's schema."""

    tools: tuple[CallableTool, ...]
    is_required: bool = False  # the answer begins with a call; else with text, and there may be none
    max_calls: int | None = None  # None: as many as the model likes
    text: TextConstraint | None = None  # what an answer without calls must be; None: any text, calls after it


Constraint = JsonSchema | JsonObject | Regex | Choice | Lark | ToolCalls


class Sampling(Message, frozen=True, kw_only=True):
    """Resolved sampling of one request: every field has a value, the seed included."""

    temperature: float = 0.6  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0  # 64 bits; drawn at admission when the client gave none
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # the client's own, besides the model's end tokens
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; n: the sampled token and the n likeliest
    prompt_logprobs: int | None = None  # as `logprobs`, of each prompt token but the first; with output 0
    constraint: Constraint | None = None  # what the answer must be; enforced token by token


class Request(Message, frozen=True, kw_only=True):
    """What a lane admits: one prompt, `num_outputs` sequences."""

    request_id: RequestId
    prompt: tuple[int, ...]
    sampling: Sampling
    num_outputs: int = 1
    tenant: str = ""
    priority: int = 0  # higher runs first
    # From its admission to a lane; outputs that still run then end with TIMEOUT. None: no limit.
    timeout_s: float | None = None
    # Tokens already generated (recovery): output_index -> ids. They are known, and not emitted again.
    generated: dict[int, tuple[int, ...]] = {}


class TokenLogprob(Message, frozen=True, kw_only=True):
    """Natural log, of the raw logits: before temperature, penalties and bias. `top`: the likeliest."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Usage(Message, frozen=True, kw_only=True):
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Course(Message, frozen=True, kw_only=True, gc=False):
    """How one output has gone in its lane so far."""

    queued_s: float = 0.0  # from its admission until it first ran
    cached_tokens: int = 0  # of its prompt, found computed when it first ran
    num_chunks: int = 0  # grants of prompt positions, those that were repeated included
    num_preemptions: int = 0


class Event(Message, frozen=True, kw_only=True, gc=False):
    """A delta of one output: tokens [first_index, first_index + len(token_ids)), then perhaps its end."""

    request_id: RequestId
    output_index: int
    first_index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    # Of the prompt's tokens from number `first_prompt_index` (at least 1) on; before all tokens of output 0.
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    first_prompt_index: int = 0
    finish: FinishReason | None = None
    stop_match: str | int | None = None  # the stop string or stop token id that ended it
    usage: Usage | None = None  # with `finish`: of this output alone
    error: str = ""  # with FinishReason.ERROR or TIMEOUT
    course: Course | None = None  # with an output's first token, and with its end
    retry_can_help: bool = False  # with ERROR: the request was in the wrong place at the wrong time


class NewSequence(Message, frozen=True, kw_only=True):
    """A sequence's first appearance in a plan: what the tp peers must know to compute and sample it."""

    seq_id: SeqId
    request_id: RequestId
    output_index: int
    prompt: tuple[int, ...]
    generated: tuple[int, ...] = ()  # known tokens after the prompt (recovery, preemption)
    sampling: Sampling


class Grant(Message, frozen=True, kw_only=True, gc=False):
    """Permission for one sequence to compute positions [start, start + num_tokens) this step."""

    seq_id: SeqId
    start: int
    num_tokens: int
    samples: bool  # the last granted position yields the next token
    scores: bool = False  # each granted position yields the logprob of the prompt token after it, if any


class PageTable(Message, frozen=True, kw_only=True):
    """Pages appended to a sequence's table since the last plan."""

    seq_id: SeqId
    first: int  # index in the table of the first of `pages`; 0 replaces the whole table
    pages: tuple[PageId, ...]


class StepPlan(Message, frozen=True, kw_only=True):
    """One lane's share of one step, as its first rank tells its tp peers."""

    generation: Generation
    step: int
    new: tuple[NewSequence, ...] = ()
    grants: tuple[Grant, ...] = ()
    page_tables: tuple[PageTable, ...] = ()
    released: tuple[SeqId, ...] = ()  # forget these; their pages may be in use by others from now on


class StepResult(Message, frozen=True, kw_only=True):
    """What one lane's step produced, in the order of the plan's sampling grants."""

    generation: Generation
    step: int
    seq_ids: tuple[SeqId, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()  # in the order of the plan's scoring grants


class LoadSeconds(Message, frozen=True, kw_only=True):
    """What a rank's load took, part after part."""

    find_s: float  # config, shard plan, index and headers, up to the first bytes of a tensor
    read_s: float  # its tensors
    lay_out_s: float  # for the kernels, and its pages
    test_s: float
    warm_s: float = 0.0  # steps of every size, so that their kernels are compiled
    record_s: float = 0.0  # graphs of these, with the other ranks


class RankProgress(Message, frozen=True, kw_only=True):
    """How far a rank is before it is ready: its shard is loaded, then tested; where steps are recorded, they
    are computed once in every size, and recorded once it has met the others."""

    num_bytes: int = 0  # of the shard; 0: not known yet
    num_bytes_loaded: int = 0
    num_bytes_tested: int = 0
    find_s: float = 0.0  # as in LoadSeconds, as far as it is known
    read_s: float = 0.0
    num_sizes: int = 0  # of steps, to be warmed
    num_sizes_warm: int = 0
    num_graphs: int = 0  # to be recorded, in this generation
    num_graphs_recorded: int = 0
    seconds: LoadSeconds | None = None  # once it is ready


class LaneLoad(Message, frozen=True, kw_only=True):
    """What a router wants to know of a lane."""

    lane: LaneId
    num_running: int
    num_waiting: int
    num_pages: int
    num_pages_free: int  # those included that still hold a prefix
    num_tokens_waiting: int = 0  # known tokens of all that wait: what it would have to compute first
    num_pages_cached: int = 0  # free, and of use to a prompt that begins with what they hold
    num_steps: int = 0  # with grants, committed: it stands still while there is work only if the lane hangs
    # Since it began: sequences that lost their pages to others; prompt tokens of those that began to run, and
    # of these the ones found in the cache.
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class AdmitReply(Message, frozen=True, kw_only=True):
    """What became of one request: `error` is empty when the lane has it."""

    request_id: RequestId
    error: str = ""
    field: str = ""  # what the client should change, when the request is at fault
    retry_can_help: bool = False


class EventBatch(Message, frozen=True, kw_only=True):
    """Events [next - len(events), next) of a lane's stream."""

    next: int
    events: tuple[Event, ...]


class LiveOutput(Message, frozen=True, kw_only=True):
    token_ids: tuple[int, ...]
    finish: FinishReason | None


class LiveRequest(Message, frozen=True, kw_only=True):
    """What a lane knows of a request, until `retain_s` after its end: a coordinator can rebuild its log."""

    request: Request
    outputs: tuple[LiveOutput, ...]


class CollectiveStats(Message, frozen=True, kw_only=True):
    """Of one kind of call, those that have ended. The wait is all the time in it, the transfer included."""

    call: str  # as `comm.Communicator` names it
    num_calls: int
    wait_s_total: float


class GroupStats(Message, frozen=True, kw_only=True):
    """One rank's calls in one of its groups, since it joined it."""

    group: str  # world, world-control, lane or lane-control
    num_begun: int  # of all kinds; who has begun fewer than its peers is late
    collectives: tuple[CollectiveStats, ...] = ()
    under_way: str = ""  # the call it is in
    waiting_s: float = 0.0  # and for how long


class RankStats(Message, frozen=True, kw_only=True):
    """Counters since the start; of this rank alone. Host and device work at the same time."""

    world_rank: int
    num_steps: int
    num_tokens_sampled: int
    step_s_total: float  # not asleep
    host_s_total: float  # of it the step loop's: plan, agreement, batch, commit; not waiting for the device
    device_s_total: float  # forward and sample, with what they wait for other ranks
    num_rows_sent: int  # rows that left this rank for another rank's experts
    num_bytes_sent: int
    num_steps_padded: int  # that exchanged tokens in frames of a fixed capacity
    num_overflows: int  # of these, steps that some rank's rows did not fit in: repeated with exact splits
    num_masks: int  # of constrained outputs' tokens, made on the host
    masks_s_total: float  # making them, part of host_s_total
    num_masks_late: int  # steps whose forward pass was done before their masks were
    expert_load: tuple[tuple[int, ...], ...]  # [moe layer][slot]: rows this rank's experts computed
    groups: tuple[GroupStats, ...] = ()  # those it is in; a group of one never waits, and is left out
    num_steps_replayed: int = 0  # from graphs; all others ran eagerly
    num_decodes_eager: int = (
        0  # of these, steps without prompts, of any lane: no graph of their size is there
    )
    num_recorded: int = 0  # graphs, one for each size of a step
