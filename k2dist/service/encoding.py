"""Prompts to token ids and constraints to grammars, in a few threads, so that none holds up the event loop.

The BPE and the grammar compiler release the interpreter lock. What waits is bounded: more is CapacityError,
not a longer queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from k2dist.errors import CapacityError
from k2dist.grammar import Grammars
from k2dist.messages import Constraint
from k2dist.service.client_request import Chat
from k2dist.service.template_process import TemplateProcess
from k2dist.text.chat import encode_prompt, render
from k2dist.text.own_template import OwnTemplate
from k2dist.text.tokenizer import Fragment, Tokenizer

T = TypeVar("T")


class Encoder:
    """`num_threads` encode at a time and `max_waiting` more may wait for them. Close it after use.

    template: the checkpoint's own, if that is to be used; it is closed too. specials_in_text: as
    `text.chat.encode_prompt`, for texts that are prompts too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        grammars: Grammars,
        *,
        template: TemplateProcess | None = None,
        specials_in_text: bool = False,
        num_threads: int = 2,
        max_waiting: int = 256,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._own = OwnTemplate(tokenizer.special_names) if template is not None else None
        self._specials_in_text = specials_in_text
        self._grammars = grammars
        self._max_pending = num_threads + max_waiting
        self._num_pending = 0
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="encode")

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._template is not None:
            self._template.close()

    async def encode_text(self, text: str, *, allow_special: bool | None = None) -> list[int]:
        """`allow_special` None: as for prompts."""
        is_allowed = self._specials_in_text if allow_special is None else allow_special
        return await self._run(lambda: self._tokenizer.encode(text, allow_special=is_allowed))

    async def encode_chat(self, chat: Chat) -> list[int]:
        return await self._run(lambda: self._encode(self._fragments(chat, add_generation_prompt=True)))

    async def check_constraint(self, constraint: Constraint) -> None:
        """RequestError if it cannot be enforced."""
        await self._run(lambda: self._grammars.check(constraint))

    async def render(self, chat: Chat, *, add_generation_prompt: bool) -> tuple[list[int], str]:
        """Ids, and the text that they stand for."""

        def both() -> tuple[list[int], str]:
            fragments = self._fragments(chat, add_generation_prompt=add_generation_prompt)
            return self._encode(fragments), "".join(fragment.text for fragment in fragments)

        return await self._run(both)

    def _encode(self, fragments: Sequence[Fragment]) -> list[int]:
        return encode_prompt(self._tokenizer, fragments, specials_in_text=self._specials_in_text)

    def _fragments(self, chat: Chat, *, add_generation_prompt: bool) -> tuple[Fragment, ...]:
        if self._template is None or self._own is None:
            return render(
                chat.messages,
                chat.tools or None,
                add_generation_prompt=add_generation_prompt,
                is_partial=chat.is_partial,
            )
        context = self._own.context(chat, add_generation_prompt=add_generation_prompt)
        return self._own.fragments(self._template.render(context), is_partial=chat.is_partial)

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
