"""Offline use from Python: prompts in, outputs out, the ranks threads of this process.

    with LLM("kimi-k2") as llm:
        for output in llm.generate(["1 + 1 =", "Once upon"], SamplingParams(max_tokens=16)):
            print(output.text)

Needs neither Ray nor gRPC. `k2dist.LLM` and `k2dist.SamplingParams` are these.
"""

from k2dist.llm.ask import Ask, Prompt
from k2dist.llm.conversation import Conversation
from k2dist.llm.llm import LLM
from k2dist.llm.output import Completion, Output
from k2dist.llm.sampling_params import SamplingParams
from k2dist.messages import ChatMessage, ToolCall
from k2dist.text.chat import Chat

__all__ = [
    "LLM",
    "Ask",
    "Chat",
    "ChatMessage",
    "Completion",
    "Conversation",
    "Output",
    "Prompt",
    "SamplingParams",
    "ToolCall",
]
