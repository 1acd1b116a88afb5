"""Fine-tuning: a network trained on some digits gets a new output layer for others.

LeNet with batch norm is trained on the digits 0 to 5; then 6 to 9 are to be told apart from a few images of each:
once from what was learnt, with a learning rate ten times as large for the new layer, once from scratch.
"""

import copy

import torch
from common import arguments, axes, digits, finding, save, train

import fastnorm.nn as nn
from fastnorm import models

FEW = 10  # images of each new class


def split(new: bool, data: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The digits 6 to 9, few of each to train with; or the others."""
    images, labels, test_images, test_labels = data
    chosen, test = (labels >= 6) == new, (test_labels >= 6) == new
    shift = 6 if new else 0
    images, labels = images[chosen], labels[chosen] - shift
    if new:
        few = torch.cat([(labels == c).nonzero()[:FEW, 0] for c in range(4)])
        images, labels = images[few], labels[few]
    return images, labels, test_images[test], test_labels[test] - shift


def main() -> None:
    args = arguments(__doc__, epochs=(10, 4), steps=(30, 10))
    data = digits()
    network = models.lenet_bn(num_classes=6, activation="relu")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    train(network, optimizer, split(False, data), args.epochs, "0 to 5")

    scratch = models.lenet_bn(num_classes=4, activation="relu")
    tuned = copy.deepcopy(network)
    tuned.fc3 = nn.Linear(tuned.fc3.in_features, 4)
    rest = [p for n, p in tuned.named_parameters() if not n.startswith("fc3.")]
    groups = [{"params": rest, "lr": 0.005}, {"params": tuned.fc3.parameters(), "lr": 0.05}]
    found = {}
    for name, model, optimizer in (
        ("fine-tuned", tuned, torch.optim.SGD(groups, momentum=0.9)),
        ("from scratch", scratch, torch.optim.SGD(scratch.parameters(), lr=0.05, momentum=0.9)),
    ):
        torch.manual_seed(0)
        found[name] = train(model, optimizer, split(True, data), args.steps, f"6 to 9, {name}")[1]
        print(f"{name:12} test accuracy {found[name][-1]:.1%}")
    figure, (axis,) = axes(1, f"digits 6 to 9 from {FEW} images of each: test accuracy")
    for name, values in found.items():
        axis.plot(range(1, args.steps + 1), values, marker=".", label=name)
    axis.set_xlabel("epoch")
    axis.legend()
    save(figure, args, __file__)
    last = {name: values[-1] for name, values in found.items()}
    finding("fine-tuning beats training from scratch", last["fine-tuned"] > last["from scratch"])


if __name__ == "__main__":
    main()
