"""Fine-tuning: a network trained on one data set gets a new output layer for another.

The first are handwritten digits on patches of a photograph, ten classes, many images. The second are digits on another
photograph, five classes (the digit modulo five), few images. The second is learnt once from what the first taught, with
a larger learning rate for the new layer than for the rest, and once from scratch.
"""

import copy

import torch
from common import arguments, axes, digits, finding, save, train
from sklearn.datasets import load_sample_image
from torch import Tensor

import fastnorm.nn as nn
from fastnorm import models

FEW = 20  # images of each class of the second data set
SIZE = 28


def on_photograph(images: Tensor, name: str) -> Tensor:
    """Digits drawn onto patches of one of scikit-learn's sample photographs, in grey."""
    photograph = torch.from_numpy(load_sample_image(name)).float().mean(2)[::4, ::4] / 255
    patches = photograph.unfold(0, SIZE, 7).unfold(1, SIZE, 7).reshape(-1, 1, SIZE, SIZE)
    return torch.maximum(patches[torch.randint(len(patches), (len(images),))] * 0.8, images)


def main() -> None:
    args = arguments(__doc__, epochs=(12, 5), steps=(40, 12))
    images, labels, test_images, test_labels = digits(SIZE)
    first = (on_photograph(images, "china.jpg"), labels, on_photograph(test_images, "china.jpg"), test_labels)
    few = torch.cat([(labels % 5 == c).nonzero()[:FEW, 0] for c in range(5)])
    second = (
        on_photograph(images[few], "flower.jpg"), labels[few] % 5, on_photograph(test_images, "flower.jpg"),
        test_labels % 5,
    )  # fmt: skip
    network = models.lenet_bn(activation="relu")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    train(network, optimizer, first, args.epochs, "first data set")

    tuned, scratch = copy.deepcopy(network), models.lenet_bn(num_classes=5, activation="relu")
    tuned.fc3 = nn.Linear(tuned.fc3.in_features, 5)
    rest = [p for n, p in tuned.named_parameters() if not n.startswith("fc3.")]
    groups = [{"params": rest, "lr": 0.01}, {"params": tuned.fc3.parameters(), "lr": 0.1}]
    found = {}
    for name, model, optimizer in (
        ("fine-tuned", tuned, torch.optim.SGD(groups, momentum=0.9)),
        ("from scratch", scratch, torch.optim.SGD(scratch.parameters(), lr=0.05, momentum=0.9)),
    ):
        found[name] = train(model, optimizer, second, args.steps, f"second, {name}")[1]
        print(f"{name:12} test accuracy {found[name][-1]:.1%}")
    figure, (axis,) = axes(1, f"five classes from {FEW} images of each: test accuracy")
    for name, values in found.items():
        axis.plot(range(1, args.steps + 1), values, marker=".", label=name)
    axis.set_xlabel("epoch")
    axis.legend()
    save(figure, args, __file__)
    last = {name: values[-1] for name, values in found.items()}
    finding("fine-tuning beats training from scratch", last["fine-tuned"] > last["from scratch"] + 0.1)


if __name__ == "__main__":
    main()
