"""Prompts to token ids and constraints to grammars, in a few threads, so that none holds up the event loop.

The BPE and the grammar compiler release the interpreter lock. What waits is bounded: more is CapacityError,
not a longer queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from k2dist.errors import CapacityError
from k2dist.grammar import Grammars
from k2dist.messages import Constraint
from k2dist.service.client_request import Chat
from k2dist.text.chat import encode_chat, render_text
from k2dist.text.tokenizer import Tokenizer

T = TypeVar("T")


class Encoder:
    """`num_threads` encode at a time and `max_waiting` more may wait for them. Close it after use."""

    def __init__(
        self, tokenizer: Tokenizer, grammars: Grammars, *, num_threads: int = 2, max_waiting: int = 256
    ) -> None:
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._max_pending = num_threads + max_waiting
        self._num_pending = 0
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="encode")

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def encode_text(self, text: str, *, allow_special: bool = False) -> list[int]:
        return await self._run(lambda: self._tokenizer.encode(text, allow_special=allow_special))

    async def encode_chat(self, chat: Chat) -> list[int]:
        return await self._run(lambda: self._encode_chat(chat, add_generation_prompt=True))

    async def check_constraint(self, constraint: Constraint) -> None:
        """RequestError if it cannot be enforced."""
        await self._run(lambda: self._grammars.check(constraint))

    async def render(self, chat: Chat, *, add_generation_prompt: bool) -> tuple[list[int], str]:
        """Ids, and the text that they stand for."""

        def both() -> tuple[list[int], str]:
            ids = self._encode_chat(chat, add_generation_prompt=add_generation_prompt)
            text = render_text(
                chat.messages,
                chat.tools or None,
                add_generation_prompt=add_generation_prompt,
                is_partial=chat.is_partial,
            )
            return ids, text

        return await self._run(both)

    def _encode_chat(self, chat: Chat, *, add_generation_prompt: bool) -> list[int]:
        return encode_chat(
            self._tokenizer,
            chat.messages,
            chat.tools or None,
            add_generation_prompt=add_generation_prompt,
            is_partial=chat.is_partial,
        )

    async def _run(self, job: Callable[[], T]) -> T:
        if self._num_pending >= self._max_pending:
            raise CapacityError(
                f"{self._num_pending} prompts and constraints wait to be read; try again later"
            )
        self._num_pending += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, job)
        future.add_done_callback(self._count_down)  # a caller may leave; its thread still works
        return await asyncio.shield(future)

    def _count_down(self, future: asyncio.Future[T]) -> None:
        self._num_pending -= 1
        if not future.cancelled():
            future.exception()  # looked at here, as a caller that left will not
