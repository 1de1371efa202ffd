"""Experts that share a centre (MPOE, Gao et al., COLING 2022).

Each expert is an MPO with auxiliary cores of its own; all of them hold the very same central
tensor, so that four experts cost little more than one. Run: python -m examples.mpo_experts
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.problem import loss_of, teacher, train
from mpo_kernels import MPOExperts, MPOShape, decompose


class Mixture(nn.Module):
    """Experts ``[rows, in] -> [rows, out]``, mixed by a gate."""

    def __init__(self, linear: nn.Linear, experts: int, num_cores: int = 3) -> None:
        super().__init__()
        shape = MPOShape.balanced(linear.in_features, linear.out_features, num_cores)
        self.experts = MPOExperts(experts, shape, shared=shape.central)
        found = decompose(linear.weight, shape).cores
        for k, (core, start) in enumerate(zip(self.experts.cores, found, strict=True)):
            core.data[:] = start
            if k != shape.central:  # so that they do not start equal
                core.data += 0.02 * torch.randn_like(core)
        self.bias = nn.Parameter(linear.bias.repeat(experts, 1))
        self.gate = nn.Linear(linear.in_features, experts)

    def forward(self, x: Tensor) -> Tensor:
        count = self.experts.num_experts
        # All rows for the first, then for the second: here every row goes to every expert.
        offsets = len(x) * torch.arange(1, count + 1, dtype=torch.int32, device=x.device)
        outputs = self.experts(x.repeat(count, 1), offsets).view(count, len(x), -1)
        return torch.einsum("eno,ne->no", outputs + self.bias[:, None], self.gate(x).softmax(-1))


def main() -> None:
    """Four experts in the place of one layer."""
    target, model = teacher(), teacher(seed=5)
    dense = sum(p.numel() for p in model[0].parameters())
    model[0] = Mixture(model[0], experts=4)
    model.requires_grad_(True)
    before = loss_of(model, target)
    train(model, target, model.parameters())
    count = sum(p.numel() for p in model[0].parameters())  # a shared tensor counts once
    print(
        f"4 experts in {count / dense:.2f} × the parameters of one dense layer, "
        f"loss {before:.4f} -> {loss_of(model, target):.4f}"
    )


if __name__ == "__main__":
    main()
