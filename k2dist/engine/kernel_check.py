"""Do this rank's kernels compute K2 on this rank's weights? A short sequence through some layers says so.

The rank acts alone with what it holds (`solo`). Each half layer starts from the stream that the kernels have
there, so roundings do not add up, and the experts are those that the kernels chose, so none can flip. What
they give is held against float64 (`plain_layer`). That twin serves for every kernel set, the reference
included, whose own twin would be itself.

Which layers, which rows: the same kernels serve all layers and all slots, and what they read there is
compared bit for bit with what was read again (`resident`). So a wrong kernel shows in any layer of its kind,
and in any row: the first dense and the first MoE layer and the last are taken. Attention and dense products
are compared in every row, enough for more than one tile and page; experts in two rows, one of the prompt and
one generated, for each expert is made float64 by itself. What a set does in one call (`k2kernels.whole`) must
have the bits of its single steps here too, in all rows.

    prompt rows ── decompressed ─┐
    generated rows ── absorbed ──┴─ attention | router | experts | shared expert or dense MLP | head

T tokens, D hidden width, K experts of a token, E experts, V vocabulary rows of this rank, R of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from k2kernels import Experts, KernelSet
from torch import Tensor

from k2dist.comm import Alone
from k2dist.config import Architecture
from k2dist.engine.load import CPU
from k2dist.engine.plain_layer import PlainLayer
from k2dist.engine.solo import solo_architecture, solo_batch, solo_cache, solo_exchange, solo_slot
from k2dist.model.decoder import in_one_call
from k2dist.model.lane_step import LaneStep
from k2dist.model.mla import attention
from k2dist.model.moe import moe, rule, through_experts
from k2dist.model.weights import LaneWeights, Layer, Mlp, Moe
from k2dist.parallel import RankPlace

NUM_TOKENS = 76  # more than one tile of 64 keys, and more than one page
NUM_GENERATED = 6
# Shares of a row's norm: on average, and for the worst row. Served: a value between two e4m3 numbers may fall
# to either, 6% of it; found on random and trained weights: 0.01 and 0.05. Float32: found were 1e-6 and 6e-6.
TOLERANCE = {torch.bfloat16: (0.03, 0.2), torch.float32: (1e-4, 1e-3)}
NUM_EXPERT_ROWS = 2
SCORE_TOLERANCE = 1e-4  # of an expert's choice: nearer ones may be taken for each other
VOCABULARY_ROWS_AT_ONCE = 1024


def layers_to_check(architecture: Architecture) -> set[int]:
    """See the module."""
    first_moe = architecture.first_dense_layers
    return {0, min(first_moe, architecture.num_layers - 1), architecture.num_layers - 1}


@dataclass(frozen=True, slots=True)
class OneLayer:
    """A stack of it, and a norm."""

    layers: tuple[Layer]
    norm_D: Tensor


class KernelCheck:
    """One rank's check, layer after layer in ascending order: `faults` names half layers that are off."""

    def __init__(
        self,
        architecture: Architecture,
        place: RankPlace,
        tp: int,
        page_tokens: int,
        kernels: KernelSet,
        device: torch.device = CPU,
    ) -> None:
        self._device = device
        self._architecture = solo_architecture(architecture, tp)
        self._place = place
        self._exchange = solo_exchange(architecture, place, device)
        self._kernels = kernels
        self._in_steps = replace(kernels, whole_attention=None, whole_moe=None, whole_layers=None)
        self._num_tokens = min(NUM_TOKENS, architecture.max_positions)
        self._cache = solo_cache(self._architecture, self._num_tokens, page_tokens, kernels, device)
        self._h_TD = torch.empty(0)
        self.worst = 0.0  # largest error so far, as a share of what was right

    def begin(self, lane: LaneWeights | None) -> None:
        """The stream before layer 0; on a rank that only holds experts, noise, which stays as it is."""
        if lane is None:
            noise = torch.Generator().manual_seed(0)
            shape = (self._num_tokens, self._architecture.hidden_size)
            self._h_TD = torch.randn(shape, generator=noise).to(self._device, self._kernels.dtype)
        else:
            token_T = (
                torch.arange(self._num_tokens, device=self._device) * 7919 % self._architecture.vocab_size
            )
            self._h_TD = lane.embed_vD[token_T]

    def layer(
        self, index: int, layer: Layer | None, experts: Experts | None, tensors: Mapping[str, Tensor]
    ) -> Iterator[str]:
        """Faults of decoder layer `index`; `tensors`: all that this rank reads of it, by published name."""
        plain = PlainLayer(tensors, self._architecture, index, is_served=self._kernels.quantises_activations)
        if layer is None:
            if experts is not None:
                yield from self._experts(index, experts, plain)
            return
        before_TD = self._h_TD
        yield from self._attention(index, layer, plain)
        match layer.mlp:
            case Mlp():
                yield from self._dense(index, layer, layer.mlp, plain)
            case Moe():
                assert experts is not None
                yield from self._moe(index, layer, layer.mlp, experts, plain)
        if self._kernels.whole_layers is not None:
            yield from self._whole_layer(index, layer, experts, before_TD)

    def head(self, lane: LaneWeights, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        """Faults of the last norm and the head, for the last rows."""
        kernels, eps = self._kernels, self._architecture.rms_norm_eps
        h_SD = self._h_TD[-2:]
        x_SD = kernels.rmsnorm(h_SD, lane.norm_D, eps)
        logit_SV = kernels.linear_bf16(x_SD, lane.head_vD, torch.float32)
        h = h_SD.double()
        unit = (h / (h.square().mean(-1, keepdim=True) + eps).sqrt()).to(kernels.dtype).double()
        x = (unit * tensors["model.norm.weight"].double()).to(kernels.dtype).double()
        rows = tensors["lm_head.weight"].split(VOCABULARY_ROWS_AT_ONCE)
        # One buffer: glibc does not put aligned memory where the last one was, and 32 of 8 MB were 256 MB.
        some_RD = x.new_empty(len(rows[0]), x.shape[1])
        wanted_SV = torch.cat([x @ some_RD[: len(some)].copy_(some).T for some in rows], dim=-1)
        yield from self._compare("head", logit_SV, wanted_SV)

    # -- half layers -----------------------------------------------------------------------------------

    def _attention(self, index: int, layer: Layer, plain: PlainLayer) -> Iterator[str]:
        x_TD = self._kernels.rmsnorm(self._h_TD, layer.attention_norm_D, self._architecture.rms_norm_eps)
        wanted_TD = plain.attention(plain.attention_input(self._h_TD.double()))
        parts = []
        num_tokens = self._num_tokens
        prompt_len = num_tokens - NUM_GENERATED
        for path, start, stop in (("prompt", 0, prompt_len), ("generated", prompt_len, num_tokens)):
            batch = solo_batch(
                num_tokens,
                self._cache.page_tokens,
                start,
                stop,
                is_prompt=path == "prompt",
                device=self._device,
            )
            step = LaneStep(batch, self._cache, Alone(), self._architecture, self._kernels)
            parts.append(attention(x_TD[start:stop], index, layer.attention, step))
            name = f"layers.{index}.attention of {path} rows"
            if self._kernels.whole_attention is not None and path == "generated":
                in_steps = replace(step, kernels=self._in_steps)
                yield from self._same(
                    name, parts[-1], attention(x_TD[start:stop], index, layer.attention, in_steps)
                )
            yield from self._compare(name, parts[-1], wanted_TD[start:stop])
        self._h_TD = self._h_TD + torch.cat(parts)

    def _dense(self, index: int, layer: Layer, mlp: Mlp, plain: PlainLayer) -> Iterator[str]:
        x_TD, plain_TD = self._mlp_inputs(layer, plain)
        delta_TD = self._kernels.mlp(x_TD, mlp.gate_up, mlp.down, torch.float32)
        yield from self._compare(f"layers.{index}.mlp", delta_TD, plain.swiglu(plain_TD, "mlp"))
        self._h_TD = self._h_TD + delta_TD.to(self._kernels.dtype)

    def _moe(
        self, index: int, layer: Layer, weights: Moe, experts: Experts, plain: PlainLayer
    ) -> Iterator[str]:
        x_TD, plain_TD = self._mlp_inputs(layer, plain)
        kernels, moe_layer = self._kernels, index - self._architecture.first_dense_layers
        logit_TE = kernels.router_logits(x_TD, weights.router.w_ED)
        expert_TK, _ = kernels.router_topk(logit_TE, weights.router.bias_E, rule(self._architecture))
        yield from self._choice(index, expert_TK, plain_TD, plain)
        name, row_S = f"layers.{index}.mlp", self._expert_rows()
        wanted_SD = plain.swiglu(plain_TD[row_S], "mlp.shared_experts")
        if self._place.experts[moe_layer]:
            delta_TD = self._moe_delta(x_TD, moe_layer, weights, experts, kernels)
            if kernels.whole_moe is not None:
                in_steps_TD = self._moe_delta(x_TD, moe_layer, weights, experts, self._in_steps)
                yield from self._same(name, delta_TD, in_steps_TD)
            weight_SK = self._weights(expert_TK[row_S], plain_TD[row_S], plain)
            out_SKD = self._plain_experts(index, expert_TK[row_S], plain_TD[row_S], plain)
            wanted_SD = wanted_SD + (weight_SK[:, :, None] * out_SKD).sum(1)
        else:
            delta_TD = kernels.mlp(x_TD, weights.shared.gate_up, weights.shared.down, torch.float32)
        yield from self._compare(name, delta_TD[row_S], wanted_SD)
        self._h_TD = self._h_TD + delta_TD.to(kernels.dtype)

    def _moe_delta(
        self, x_TD: Tensor, moe_layer: int, weights: Moe, experts: Experts, kernels: KernelSet
    ) -> Tensor:
        return moe(x_TD, moe_layer, weights, experts, self._exchange, self._architecture, kernels)

    def _expert_rows(self) -> Tensor:
        """The first, of the prompt, and the last, a generated one."""
        return torch.linspace(0, self._num_tokens - 1, NUM_EXPERT_ROWS, device=self._device).long()

    def _experts(self, index: int, experts: Experts, plain: PlainLayer) -> Iterator[str]:
        """A rank without a lane: every expert number in turn, unweighted."""
        a, moe_layer = self._architecture, index - self._architecture.first_dense_layers
        if not self._place.experts[moe_layer]:
            return
        expert_TK = (torch.arange(self._num_tokens * a.top_k, device=self._device) % a.num_experts).view(
            -1, a.top_k
        )
        out_TKD = through_experts(self._h_TD, expert_TK, moe_layer, experts, self._exchange, a, self._kernels)
        row_S = self._expert_rows()
        wanted_SKD = self._plain_experts(index, expert_TK[row_S], self._h_TD[row_S].double(), plain)
        yield from self._compare(
            f"layers.{index}.mlp.experts", out_TKD[row_S].flatten(0, 1), wanted_SKD.flatten(0, 1)
        )

    def _whole_layer(self, index: int, layer: Layer, experts: Experts | None, h_TD: Tensor) -> Iterator[str]:
        """Generated rows in one call, from the stream before the layer to that after it, normed."""
        moe_layer, all_experts, slots = index - self._architecture.first_dense_layers, [], []
        if experts is not None:
            if not self._place.experts[moe_layer]:
                return
            slot_E = self._exchange.home_slots(moe_layer)
            assert slot_E is not None, "in a world of one all experts are at home"
            all_experts, slots = [experts], [slot_E]
        start, stop = self._num_tokens - NUM_GENERATED, self._num_tokens
        batch = solo_batch(stop, self._cache.page_tokens, start, stop, is_prompt=False, device=self._device)
        cache = replace(self._cache, layers=(self._cache.layers[index],))
        step = LaneStep(batch, cache, Alone(), self._architecture, self._kernels)
        stack = OneLayer((layer,), layer.mlp_norm_D)
        x_TD, _ = in_one_call(h_TD[start:].clone(), stack, all_experts, slots, step)
        eps = self._architecture.rms_norm_eps
        wanted_TD = self._kernels.rmsnorm(self._h_TD[start:], layer.mlp_norm_D, eps)
        yield from self._same(f"layers.{index} as a whole", x_TD, wanted_TD)

    # -- in float64 ------------------------------------------------------------------------------------

    def _mlp_inputs(self, layer: Layer, plain: PlainLayer) -> tuple[Tensor, Tensor]:
        """The normed stream by the kernels, and plainly."""
        x_TD = self._kernels.rmsnorm(self._h_TD, layer.mlp_norm_D, self._architecture.rms_norm_eps)
        return x_TD, plain.mlp_input(self._h_TD.double())

    def _plain_experts(self, index: int, expert_TK: Tensor, x_TD: Tensor, plain: PlainLayer) -> Tensor:
        """[T, K, D]: of the experts that stand in for those chosen, each made float64 by itself."""
        slots: Sequence[int] = self._place.experts[index - self._architecture.first_dense_layers]
        slot_TK = solo_slot(expert_TK, len(slots))
        out_TKD = x_TD.new_empty(*expert_TK.shape, x_TD.shape[1])
        for slot, expert in enumerate(slots):
            row_M, k_M = (slot_TK == slot).nonzero(as_tuple=True)
            if len(row_M):
                out_TKD[row_M, k_M] = plain.swiglu(x_TD[row_M], f"mlp.experts.{expert}")
        return out_TKD

    def _weights(self, expert_TK: Tensor, x_TD: Tensor, plain: PlainLayer) -> Tensor:
        score_TK = plain.router_scores(x_TD).gather(-1, expert_TK)
        total = score_TK.sum(-1, keepdim=True) if self._architecture.norm_top_k else 1.0
        return score_TK / total * self._architecture.routed_scale

    def _choice(self, index: int, expert_TK: Tensor, x_TD: Tensor, plain: PlainLayer) -> Iterator[str]:
        """The chosen must be the best, ties aside. Not told of models whose experts come in groups."""
        if self._architecture.num_groups > 1:
            return
        choice_TE = plain.router_scores(x_TD) + plain.router_bias
        worst_in_T = choice_TE.gather(-1, expert_TK).amin(-1)
        best_out_T = choice_TE.scatter(-1, expert_TK, -torch.inf).amax(-1)
        missed = float((best_out_T - worst_in_T).max())
        if not missed <= SCORE_TOLERANCE:
            yield f"layers.{index}.mlp: the router passed over an expert that scores {missed:.2g} more"

    def _same(self, name: str, whole_TD: Tensor, in_steps_TD: Tensor) -> Iterator[str]:
        if not torch.equal(whole_TD, in_steps_TD):
            yield f"{name}: kernels {self._kernels.name!r} give other bits in one call than in single steps"

    def _compare(self, name: str, found: Tensor, wanted: Tensor) -> Iterator[str]:
        off_T = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)
        mean, worst = float(off_T.mean()), float(off_T.max())
        mean_max, worst_max = TOLERANCE[self._kernels.dtype]
        if not (mean <= mean_max and worst <= worst_max):  # NaN is a fault too
            yield (
                f"{name}: kernels {self._kernels.name!r} are off by {mean:.2g} of the result on average "
                f"(at most {mean_max:.2g}), a row by {worst:.2g} (at most {worst_max:.2g})"
            )
        self.worst = max(self.worst, worst)
