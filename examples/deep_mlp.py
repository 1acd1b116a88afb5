"""The standard deviation of every layer's output in an MLP of 100 layers of 256, for a batch of 16.

With torch's default initialisation it dies away; with Kaiming's it wanders; with batch norm before each activation it
stays in a narrow band without any initialisation.
"""

import torch
from common import arguments, axes, each, finding, save

import fastnorm.nn as nn

WIDTH, BATCH = 256, 16


def mlp(depth: int, norm: bool) -> nn.Sequential:
    """Linear, (batch norm and) relu; batch norm ends with the relu, in one kernel."""
    layers = []
    for _ in range(depth):
        layers.append(nn.Linear(WIDTH, WIDTH, bias=not norm))
        layers.append(nn.BatchNorm1d(WIDTH, activation="relu") if norm else nn.ReLU())
    return nn.Sequential(*layers)


@torch.no_grad()
def deviations(model: nn.Sequential, x: torch.Tensor, about: str) -> list[float]:
    """Of what each activation puts out."""
    found = []
    for i, layer in enumerate(each(list(model), about)):
        x = layer(x)
        if i % 2:
            found.append(x.std().item())
    return found


def main() -> None:
    args = arguments(__doc__, depth=(100, 100))
    x = torch.randn(BATCH, WIDTH)
    plain, kaiming, norm = mlp(args.depth, False), mlp(args.depth, False), mlp(args.depth, True)
    for layer in kaiming:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    found = {
        "default initialisation": deviations(plain, x, "default"),
        "Kaiming": deviations(kaiming, x, "Kaiming"),
        "batch norm": deviations(norm, x, "batch norm"),
    }
    figure, (axis,) = axes(1, f"{args.depth} layers of {WIDTH}: standard deviation of each layer's output")
    for name, values in found.items():
        axis.plot(values, label=name)
        print(f"{name:24} first {values[0]:.4f}, last {values[-1]:.4f}, range {min(values):.4f} to {max(values):.4f}")
    axis.set_yscale("log")
    axis.set_xlabel("layer")
    axis.legend()
    save(figure, args, __file__)
    spread = {name: max(values) / min(values) for name, values in found.items()}
    band, others = spread["batch norm"], min(v for n, v in spread.items() if n != "batch norm")
    finding(f"batch norm's largest is {band:.2f} times its smallest, the others' {others:.1f}", band < 1.5 < others)
    low, high = min(found["batch norm"]), max(found["batch norm"])
    finding(f"with batch norm it stays from {low:.2f} to {high:.2f}", 0.4 < low < high < 0.8)


if __name__ == "__main__":
    main()
