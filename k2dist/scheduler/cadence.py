"""In which steps prompts are computed: in the same ones on all lanes.

A step takes as long as its slowest rank, so one lane's prompt slows the tokens of all lanes. With `every` = 2
all lanes compute prompts in one step, and in the next one only what decodes, whose tokens then come sooner:

    every = 1    P P P P P P    a decoding sequence waits for a prompt's chunk before each token
    every = 2    P D P D P D    before every second one; prompts take longer

While nobody decodes there is nobody to spare, and every step computes prompts. Every rank of the world notes
the same agreements, and so comes to the same answer.
"""

from __future__ import annotations


class PrefillCadence:
    """See the module."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._num_steps_since = every  # since the last step with prompts, that one included

    @property
    def allows_prefill(self) -> bool:
        """Whether the next step may compute prompts."""
        return self._num_steps_since >= self._every

    def note(self, *, has_prompts: bool, has_decodes: bool) -> None:
        """What the world has agreed to compute in the next step."""
        if not has_decodes:
            self._num_steps_since = self._every
        elif has_prompts:
            self._num_steps_since = 1
        else:
            self._num_steps_since += 1
