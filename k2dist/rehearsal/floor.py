"""The least time that each part of a step can take: its products' bytes and operations over the ceilings.

Each product and each attention takes the longer of moving its bytes once and doing its operations; the
exchange's parts read and write their rows once. Norms, rotations, quantising and SwiGLU count nothing: they
can be done on the way. Weights count as published (float8), whatever the kernels keep; of experts only those
that have rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from k2kernels import absorb, fp8_gemm, grouped_gemm, linear_bf16, mla_decode, mla_prefill, router_logits
from k2kernels.cost import Cost

from k2dist.config import Architecture
from k2dist.rehearsal.ceilings import Ceilings
from k2dist.rehearsal.parts import Part
from k2dist.rehearsal.timed import Traffic

_LOGIT_BYTES = 4  # float32


@dataclass(frozen=True, slots=True)
class LaneWork:
    """A step of one rank of a lane. All zero on a rank without a lane."""

    num_rows: int  # of the lane
    own_rows: int  # of this rank's share
    decode_rows: int
    num_keys: int  # that a decode row sees
    prompt_rows: int  # of one prompt, from its beginning on

    @property
    def num_samples(self) -> int:
        return self.decode_rows + min(self.prompt_rows, 1)


class Floor:
    """Of one rank of `architecture` at `tp`, against `ceilings`."""

    def __init__(self, architecture: Architecture, tp: int, return_bytes: int, ceilings: Ceilings) -> None:
        self._a = architecture
        self._tp = tp
        self._heads = architecture.num_heads // tp
        self._return_bytes = return_bytes  # of one element of an expert's output
        self._ceilings = ceilings

    def parts_s(self, work: LaneWork, traffic: Sequence[Traffic]) -> dict[Part, float]:
        """Seconds of each part of a step; 0 where nothing is known that it must do."""
        a, floor_s = self._a, dict.fromkeys(Part, 0.0)
        if work.num_rows:
            floor_s[Part.ATTENTION] = a.num_layers * sum(self._attention(work))
            width = a.intermediate_size // self._tp
            floor_s[Part.DENSE] = a.first_dense_layers * self._mlp(work.num_rows, width)
            floor_s[Part.HEAD] = self._plain(
                linear_bf16.cost(
                    linear_bf16.Case(T=work.num_samples, N=a.vocab_size // self._tp, K=a.hidden_size)
                )
            )
            logits = work.num_samples * a.vocab_size // self._tp
            floor_s[Part.SAMPLE] = logits * _LOGIT_BYTES / self._ceilings.read_bytes_per_s
        for layer in traffic:
            floor_s[Part.DISPATCH] += self._moved((layer.rows_sent + layer.rows_arrived) * layer.row_bytes)
            floor_s[Part.EXPERTS] += sum(self._experts(layer))
            outputs = layer.pairs + layer.num_rows * a.top_k
            floor_s[Part.COMBINE] += self._moved(outputs * a.hidden_size * self._return_bytes)
            if layer.num_rows:
                case = router_logits.Case(T=layer.num_rows, E=a.num_experts, D=a.hidden_size)
                floor_s[Part.ROUTER] += self._plain(router_logits.cost(case))
                floor_s[Part.SHARED] += self._mlp(layer.num_rows, a.shared_width)
        return floor_s

    def _attention(self, work: LaneWork) -> Iterator[float]:
        """Of one layer."""
        a, heads, decoded, prompt = self._a, self._heads, work.decode_rows, work.prompt_rows
        yield self._linear(work.own_rows, a.q_lora_rank + a.latent_dim, a.hidden_size)
        yield self._linear(work.num_rows, heads * a.qk_head_dim, a.q_lora_rank)
        yield self._linear(work.num_rows, a.hidden_size, heads * a.v_head_dim)
        if decoded:
            for inner, outer in ((a.qk_nope_head_dim, a.kv_lora_rank), (a.kv_lora_rank, a.v_head_dim)):
                yield self._plain(absorb.cost(absorb.Case(T=decoded, H=heads, K=inner, N=outer)))
            yield self._plain(
                mla_decode.cost(
                    mla_decode.Case(
                        R=decoded, num_keys=work.num_keys, H=heads, L=a.kv_lora_rank, D=a.latent_dim
                    )
                )
            )
        if prompt:
            yield self._plain(
                mla_prefill.cost(
                    mla_prefill.Case(
                        T=prompt,
                        start=0,
                        H=heads,
                        N=a.qk_nope_head_dim,
                        R=a.qk_rope_head_dim,
                        L=a.kv_lora_rank,
                        V=a.v_head_dim,
                    )
                )
            )

    def _experts(self, layer: Traffic) -> Iterator[float]:
        """Of one layer. A kernel set's weights of a slot without a row are not read."""
        a, width = self._a, self._a.moe_intermediate_size
        if layer.pairs:
            for outputs, inputs in ((2 * width, a.hidden_size), (a.hidden_size, width)):
                case = grouped_gemm.Case(M=layer.pairs, e=layer.slots_hit, N=outputs, K=inputs)
                cost = grouped_gemm.cost(case)
                yield self._served(cost) if a.scale_block else self._plain(_widened(cost))

    def _mlp(self, num_rows: int, width: int) -> float:
        hidden = self._a.hidden_size
        return self._linear(num_rows, 2 * width, hidden) + self._linear(num_rows, hidden, width)

    def _linear(self, num_rows: int, outputs: int, inputs: int) -> float:
        if num_rows == 0:
            return 0.0
        if self._a.scale_block is None:
            return self._plain(linear_bf16.cost(linear_bf16.Case(T=num_rows, N=outputs, K=inputs)))
        return self._served(fp8_gemm.cost(fp8_gemm.Case(T=num_rows, N=outputs, K=inputs)))

    def _served(self, cost: Cost) -> float:
        """Of float8 by float8."""
        return self._longer_s(cost, self._ceilings.float8_flops_per_s)

    def _plain(self, cost: Cost) -> float:
        return self._longer_s(cost, self._ceilings.bf16_flops_per_s)

    def _longer_s(self, cost: Cost, flops_per_s: float) -> float:
        return max(cost.num_bytes / self._ceilings.read_bytes_per_s, cost.num_flops / flops_per_s)

    def _moved(self, num_bytes: int) -> float:
        """Read once and written once."""
        return 2 * num_bytes / self._ceilings.copy_bytes_per_s


def _widened(cost: Cost) -> Cost:
    """Of bfloat16 weights where the op counts float8 ones."""
    return Cost(2 * cost.num_bytes, cost.num_flops)
