"""An MPO adapter: a small chain of cores trained beside a frozen dense weight.

As in LoRETTA and TT-LoRA: y = W x + Δ x, where Δ starts as zero and has few parameters.
Run: python -m examples.mpo_adapter
"""

from __future__ import annotations

from torch import Tensor, nn

from examples.problem import loss_of, teacher, train
from mpo_kernels import MPOLinear, MPOShape


class MPOAdapter(nn.Module):
    """A dense layer, frozen, and an MPO of bond ``rank`` beside it."""

    def __init__(self, linear: nn.Linear, rank: int, num_cores: int = 3) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        shape = MPOShape.balanced(linear.in_features, linear.out_features, num_cores, rank)
        self.delta = MPOLinear(linear.in_features, linear.out_features, shape, bias=False)
        nn.init.zeros_(self.delta.cores[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.delta(x)

    def merged(self) -> nn.Linear:
        """One dense layer that computes the same."""
        linear = self.delta.to_linear()
        linear.weight.data += self.linear.weight
        linear.bias = self.linear.bias
        return linear


def main() -> None:
    """Adapt a network to another one that differs from it by a matrix of few cores."""
    target, model = teacher(), teacher()
    shift = MPOLinear(64, 64, MPOShape.balanced(64, 64, 3, 4), bias=False)
    target[0].weight.data += 2 * shift.to_linear().weight
    model[0] = MPOAdapter(model[0], rank=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = loss_of(model, target)
    train(model, target, trained)
    count = sum(p.numel() for p in trained)
    print(f"{count} trained parameters, loss {before:.4f} -> {loss_of(model, target):.4f}")


if __name__ == "__main__":
    main()
