"""What changes the weights of the network: Muon for the matrices of the blocks, AdamW for the rest.

Muon makes each update orthogonal (Jordan et al. 2024, "Muon: An optimizer for hidden layers in
neural networks", kellerjordan.github.io/posts/muon); its scale is that of Liu et al. 2025
(arXiv:2502.16982, section 2.2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .network import GPT2


def orthogonal(update: Tensor) -> Tensor:
    """Nearest matrices with equal singular values, roughly, of a stack (N, R, C) with R <= C.

    Five steps of the quintic iteration x <- a x + b (x x^T) x + c (x x^T)^2 x (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = update / (update.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal; the root mean square of an update is 0.2 x the rate.

    `dtype` is what the matrices are multiplied in; bfloat16 will do (Jordan et al. 2024).
    """

    def __init__(self, groups: list[list[nn.Parameter]], decay: float, dtype: torch.dtype) -> None:
        super().__init__([{"params": group} for group in groups], {"lr": 0.0, "decay": decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One step; each group holds matrices of one shape, which go through in one stack."""
        for group in self.param_groups:
            parameters = group["params"]
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            stack = torch.stack(torch._foreach_lerp(gradients, momenta, 0.95))  # noqa: SLF001
            stack = stack.to(self.dtype)
            tall = stack.shape[1] > stack.shape[2]
            stack = orthogonal(stack.mT if tall else stack)
            scale = 0.2 * math.sqrt(max(stack.shape[1:])) * group["lr"]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["decay"])
            updates = list((stack.mT if tall else stack).float().unbind())
            torch._foreach_add_(parameters, updates, alpha=-scale)


def optimizers(model: GPT2, decay: float, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Muon, which multiplies in `dtype`, for the matrices of the blocks, AdamW for the rest."""
    matrices: dict[tuple[int, ...], list[nn.Parameter]] = {}
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.startswith("h.") and parameter.ndim == 2:
            matrices.setdefault(tuple(parameter.shape), []).append(parameter)
        elif parameter.ndim == 1:
            vectors.append(parameter)
    tables = [
        {"params": vectors, "weight_decay": 0.0},
        {"params": [model.wte, model.wpe], "weight_decay": decay},
    ]
    return [
        Muon(list(matrices.values()), decay, dtype),
        torch.optim.AdamW(tables, betas=(0.9, 0.95)),
    ]
