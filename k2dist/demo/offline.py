"""Chat with a checkpoint in transformers, one conversation at a time: the evaluation's second opinion.

Needs the extra `[train]`. Weights are dequantised; nothing else is float8, so this is what block-FP8 weights
alone cost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from k2dist.checkpoint import dequantise_block_fp8
from k2dist.demo.chats import MAX_TOKENS, Turn, parse_answer
from k2dist.parallel.published import SCALE_SUFFIX
from k2dist.text.chat import encode_chat
from k2dist.text.tokenizer import Tokenizer, end_token_ids
from k2dist.text.tool_calls import Answer


class OfflineChat:
    """`chats.Chat` on transformers' DeepSeek-V3, greedy, in float32."""

    def __init__(self, model_dir: Path, tensors: Mapping[str, Tensor]) -> None:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        end_ids = json.loads((model_dir / "generation_config.json").read_text(encoding="utf-8"))[
            "eos_token_id"
        ]
        self._tokenizer = Tokenizer.load(model_dir)
        self._ends = sorted(end_token_ids(self._tokenizer, end_ids))
        self._model = transformers_model(config, tensors)

    @classmethod
    def load(cls, model_dir: Path) -> OfflineChat:
        """With the weights of `model_dir`, dequantised."""
        published: dict[str, Tensor] = {}
        for path in sorted(model_dir.glob("model-*.safetensors")):
            published |= load_file(path)
        return cls(model_dir, dequantised(published))

    def __call__(self, turns: Sequence[Turn]) -> list[Answer]:
        return [self._answer(turn) for turn in turns]

    @torch.no_grad()
    def _answer(self, turn: Turn) -> Answer:
        prompt = encode_chat(self._tokenizer, turn.messages, turn.tools)
        out = self._model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=self._ends,
            pad_token_id=self._ends[0],
        )
        return parse_answer(self._tokenizer, out[0, len(prompt) :].tolist(), self._ends)


def transformers_model(config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> DeepseekV3ForCausalLM:
    """transformers' float32 model of `tensors` (by published name), whose experts it keeps stacked."""
    kept = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**kept)).float().eval()
    num_experts = model.config.n_routed_experts
    state = dict(tensors)
    for layer in range(model.config.first_k_dense_replace, model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        names = [f"{prefix}{expert}." for expert in range(num_experts)]
        gate_up = [
            torch.cat([state.pop(f"{name}gate_proj.weight"), state.pop(f"{name}up_proj.weight")])
            for name in names
        ]
        state[f"{prefix}gate_up_proj"] = torch.stack(gate_up)
        state[f"{prefix}down_proj"] = torch.stack([state.pop(f"{name}down_proj.weight") for name in names])
    model.load_state_dict(state)
    return model


def dequantised(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 weights from what a checkpoint's files hold; leftovers dropped."""
    tensors: dict[str, Tensor] = {}
    for name, value in published.items():
        if name.endswith((SCALE_SUFFIX, "rotary_emb.inv_freq")):
            continue
        scale = published.get(name + SCALE_SUFFIX)
        tensors[name] = value.float() if scale is None else dequantise_block_fp8(value, scale)
    return tensors
