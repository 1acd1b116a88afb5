"""LeNet with sigmoids on handwritten digits, with and without batch norm, at several learning rates.

Without batch norm and without careful initialisation it does not leave chance for many epochs; with it, it learns at
once, at any of these rates.
"""

import torch
from common import arguments, axes, digits, finding, save, train

from fastnorm import models


def main() -> None:
    args = arguments(__doc__, epochs=(10, 2))
    rates = (0.1,) if args.quick else (0.05, 0.1, 0.5, 1.0)
    data, networks = digits(), {"without": models.lenet, "with batch norm": models.lenet_bn}
    figure, (left, right) = axes(2, "LeNet with sigmoids: training loss and test accuracy")
    last: dict[str, list[float]] = {name: [] for name in networks}
    for name, style in zip(networks, ("--", "-"), strict=True):
        for i, rate in enumerate(rates):
            torch.manual_seed(0)
            model = networks[name]()
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
            losses, accuracies = train(model, optimizer, data, args.epochs, f"{name}, rate {rate}")
            last[name].append(accuracies[-1])
            for axis, values in ((left, losses), (right, accuracies)):
                axis.plot(range(1, args.epochs + 1), values, style, color=f"C{i}", label=f"{name}, {rate}")
    left.set_xlabel("epoch")
    right.set_xlabel("epoch")
    right.legend()
    for name, values in last.items():
        print(f"{name:16} test accuracy at rates {rates}: {', '.join(f'{v:.1%}' for v in values)}")
    save(figure, args, __file__)
    worst, best = min(last["with batch norm"]), max(last["without"])
    finding(f"with batch norm the worst rate gives {worst:.1%}, without the best gives {best:.1%}", worst > best)


if __name__ == "__main__":
    main()
