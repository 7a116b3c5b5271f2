"""What a client may ask of an answer's form and no lane enforces yet: refused by name, never passed over.

TODO: goes when the engine masks tokens by `Sampling.constraint` (branch `grammar`).
"""

from __future__ import annotations

from k2dist.errors import RequestError
from k2dist.service.client_request import Chat, ClientRequest

_WHY = "is not enforced by this version; leave it out"


def refuse_unenforced(request: ClientRequest, *, form_field: str) -> None:
    """RequestError naming the field. `form_field`: what the API calls the constraint of the text."""
    if request.sampling.constraint is not None:
        raise RequestError(form_field, _WHY)
    chat = request.prompt
    if not isinstance(chat, Chat):
        return
    if chat.tool_choice.mode in ("required", "named"):
        raise RequestError("tool_choice", f"{chat.tool_choice.mode} {_WHY}; use auto or none")
    if chat.tools and not chat.tool_choice.is_parallel:
        raise RequestError("parallel_tool_calls", f"false {_WHY}")
    for index, tool in enumerate(chat.tools):
        if tool["function"].get("strict"):
            raise RequestError(f"tools[{index}].function.strict", f"true {_WHY}")
