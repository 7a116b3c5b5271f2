"""One prompt with its sampling, and how it becomes a request that a lane takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from k2dist.config import read_architecture
from k2dist.config.generation_config import read_sampling_defaults
from k2dist.errors import CheckpointError, RequestError
from k2dist.ids import RequestId
from k2dist.llm.sampling_params import SamplingParams
from k2dist.messages import Request, Sampling
from k2dist.scheduler import check_request, resolve_sampling
from k2dist.text import Chat, OutputReader, Tokenizer, encode_chat

Prompt = str | Sequence[int] | Chat  # text encoded as it is, token ids, or a conversation to continue


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt, and how to sample its outputs."""

    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)


def check_prompt(prompt: object, field: str) -> None:
    """RequestError unless `prompt` is of a form that can be a prompt; what it says is looked at later."""
    if isinstance(prompt, str | Chat):
        return
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise RequestError(field, f"a {type(prompt).__name__}; give text or a list of token ids")
    strange = next((i for i, token_id in enumerate(prompt) if type(token_id) is not int), None)
    if strange is not None:
        kind = type(prompt[strange]).__name__
        raise RequestError(f"{field}[{strange}]", f"a {kind}; a prompt is text or a list of token ids (int)")


class Prepare:
    """From asks to requests of one model. A lane has `num_pages` pages of `page_tokens` tokens.

    CheckpointError: no such model, or its files contradict each other.
    """

    def __init__(
        self, model_dir: Path, *, page_tokens: int, num_pages: int, draw_seed: Callable[[], int]
    ) -> None:
        architecture = read_architecture(model_dir)
        self.tokenizer = Tokenizer.load(model_dir)
        if self.tokenizer.vocab_size > architecture.vocab_size:
            raise CheckpointError(
                f"{model_dir}: {self.tokenizer.vocab_size} ids in the tokenizer, but vocab_size is "
                f"{architecture.vocab_size} in config.json; they belong to different models"
            )
        self._vocab_size = self.tokenizer.vocab_size
        self._context = architecture.max_positions
        self._page_tokens = page_tokens
        self._num_pages = num_pages
        self._defaults = read_sampling_defaults(model_dir)
        self._draw_seed = draw_seed

    def request(self, request_id: RequestId, ask: Ask) -> Request:
        """RequestError, naming the field, for what this model or its lanes can never answer."""
        prompt = self._encode(ask.prompt)
        if not prompt:
            raise RequestError("prompt", "empty; give at least one token")
        self._check_pages(len(prompt))
        sampling = resolve_sampling(
            ask.sampling.partial(),
            self._defaults,
            prompt_tokens=len(prompt),
            max_positions=min(self._context, self._num_pages * self._page_tokens),
            vocab_size=self._vocab_size,
            draw_seed=self._draw_seed,
        )
        request = Request(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling,
            num_outputs=ask.sampling.n,
            timeout_s=ask.sampling.timeout_s,
        )
        check_request(request, self._vocab_size)
        self.reader(ask.prompt, sampling)  # raises for tools that it cannot read, while there is time
        return request

    def reader(self, prompt: Prompt, sampling: Sampling) -> OutputReader:
        """What reads one output to this prompt. Tool calls are looked for where tools were offered."""
        chat = prompt if isinstance(prompt, Chat) else None
        return OutputReader(
            self.tokenizer,
            stops=sampling.stop,
            min_tokens=sampling.min_tokens,
            tools=chat.tools if chat is not None and chat.tools else None,
            first_call=chat.num_calls if chat is not None else 0,
        )

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        match prompt:
            case str(text):
                return tuple(self.tokenizer.encode(text))
            case Chat(messages=messages, tools=tools):
                return tuple(encode_chat(self.tokenizer, messages, tools or None))
            case token_ids:
                return tuple(token_ids)

    def _check_pages(self, prompt_len: int) -> None:
        if prompt_len < self._context and prompt_len >= self._num_pages * self._page_tokens:
            raise RequestError(
                "prompt",
                f"{prompt_len} tokens and one to generate do not fit into a lane's {self._num_pages} pages "
                f"of {self._page_tokens}; shorten it, or raise num_pages",
            )
