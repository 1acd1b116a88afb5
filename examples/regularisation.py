"""Ten points and three hidden layers of 200: weight decay, dropout, train() against eval().

Weight decay 0 against 1e-2 and dropout 0 against 0.5, each trained on the same ten noisy points of a line.
"""

import torch
import torch.nn.functional as F
from common import arguments, axes, each, finding, save

import fastnorm.nn as nn


def network(dropout: float) -> nn.Sequential:
    layers: list[torch.nn.Module] = []
    for inputs in (1, 200, 200):
        layers += [nn.Linear(inputs, 200), nn.Dropout(dropout), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(200, 1))


def weight_norm(model: torch.nn.Module) -> float:
    """Of the matrices, Euclidean."""
    return sum(p.square().sum() for p in model.parameters() if p.dim() > 1).sqrt().item()


def main() -> None:
    args = arguments(__doc__, steps=(2000, 400))
    x = torch.linspace(-1, 1, 10).unsqueeze(1)
    y, fine = x + 0.3 * torch.randn_like(x), torch.linspace(-1, 1, 200).unsqueeze(1)
    settings = {
        "plain": (0.0, 0.0), "weight decay 1e-2": (1e-2, 0.0), "dropout 0.5": (0.0, 0.5), "both": (1e-2, 0.5),
    }  # fmt: skip
    figure, (left, right) = axes(2, "ten points: what is learnt, and the size of the weights")
    errors, norms, models = {}, {}, {}
    for name, (decay, dropout) in settings.items():
        torch.manual_seed(0)
        model = models[name] = network(dropout)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=decay)
        norms[name] = []
        for _ in each(range(args.steps), name):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            norms[name].append(weight_norm(model))
        with torch.no_grad():
            curve = model.eval()(fine)
        errors[name] = F.mse_loss(curve, fine).item()
        left.plot(fine, curve, label=name)
        right.plot(norms[name], label=name)
        print(f"{name:18} error {errors[name]:.4f}, weights {norms[name][0]:.2f} -> {norms[name][-1]:.2f}")
    left.scatter(x, y, color="black", label="the ten points")
    left.legend()
    right.set_xlabel("step")
    save(figure, args, __file__)

    model = models["dropout 0.5"]
    with torch.no_grad():
        training = [model.train()(fine) for _ in range(2)]
        evaluation = [model.eval()(fine) for _ in range(2)]
    finding("dropout draws anew in train() and not in eval()", not training[0].equal(training[1])
            and evaluation[0].equal(evaluation[1]))  # fmt: skip
    decayed, plain = norms["weight decay 1e-2"], norms["plain"]
    finding("weight decay makes the weights drift to 0", decayed[-1] < 0.7 * plain[-1] and decayed[-1] < decayed[0])
    finding("each regularised network is nearer to the line than the plain one", max(
        errors[n] for n in settings if n != "plain") < errors["plain"])  # fmt: skip


if __name__ == "__main__":
    main()
