"""Over-parameterised fine-tuning, merged afterwards (OPF, Gao et al., ACL 2023).

While it is fine-tuned a matrix is a long exact chain with more parameters than the matrix; then the
chain is contracted, so that the model that is served is as large as it was.
Run: python -m examples.over_parameterised
"""

from __future__ import annotations

from torch import nn

from examples.problem import loss_of, teacher, train
from mpo_kernels import MPOLinear, MPOShape


def widened(linear: nn.Linear, num_cores: int = 5) -> MPOLinear:
    """An exact chain for a dense layer."""
    shape = MPOShape.balanced(linear.in_features, linear.out_features, num_cores)
    return MPOLinear.from_linear(linear, shape)


def main() -> None:
    """Fine-tune through chains, then go back to dense."""
    target, model = teacher(), teacher(seed=5)
    dense = sum(p.numel() for p in model.parameters())
    for k in (0, 2):
        model[k] = widened(model[k])
    before = loss_of(model, target)
    model.requires_grad_(True)
    train(model, target, model.parameters(), rate=1e-3)
    trained, after = sum(p.numel() for p in model.parameters()), loss_of(model, target)
    for k in (0, 2):
        model[k] = model[k].to_linear()
    merged = sum(p.numel() for p in model.parameters())
    print(
        f"{trained / dense:.2f} × the parameters in training, {merged / dense:.2f} × merged, "
        f"loss {before:.4f} -> {after:.4f}, merged {loss_of(model, target):.4f}"
    )


if __name__ == "__main__":
    main()
