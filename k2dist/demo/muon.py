"""Muon: momentum whose update is made orthogonal, for matrices.

Source: K. Jordan 2024, "Muon"; Liu et al. 2025, arXiv:2502.16982 (Moonshot, for large models).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from Jordan's post
_NUM_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For parameters [N, K], or [E, N, K] as E matrices. Matrices of one shape are worked in one batch."""

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                by_shape[(param.shape[-2], param.shape[-1])].append(param)
            for (rows, columns), params in by_shape.items():
                update = orthogonal(torch.cat([self._update(param, group["momentum"]) for param in params]))
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                parts = update.split([param.numel() // (rows * columns) for param in params])
                for param, part in zip(params, parts, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.sub_(part.view_as(param), alpha=rate)
        return None

    def _update(self, param: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of a parameter as [matrices, N, K]."""
        assert param.grad is not None
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        kept: Tensor = state["momentum"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(kept, momentum).view(-1, *param.shape[-2:])


def orthogonal(x_MNK: Tensor) -> Tensor:
    """The nearest matrices with equal singular values, roughly 1; Newton-Schulz in bfloat16."""
    is_tall = x_MNK.shape[1] > x_MNK.shape[2]
    x = (x_MNK.transpose(1, 2) if is_tall else x_MNK).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.transpose(1, 2) if is_tall else x
    return result.float()
