"""Whole networks: a training step and inference, fastnorm.models against torch.nn's with the same weights; and, where
torchvision is installed, more of its networks as they are against what fastnorm.fuse() makes of them.

`what` says how many of torch.nn's bytes a training step keeps for its backward pass.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnorm import fuse, models, save_memory, saved_bytes

from .common import Case, torchvision
from .twins import twin

BATCH, SIZE = 16, 32  # of the networks with stems for small images
NETWORKS = ("lenet_bn", "alexnet", "vgg16_bn", "googlenet", "resnet18", "resnet50", "densenet121")
QUICK_NETWORKS = ("lenet_bn", "resnet18")
FUSED_BATCH, FUSED_SIZE = 4, 224  # of torchvision's
FUSED_NETWORKS = (
    "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x1_0", "mnasnet1_0", "regnet_y_400mf",
    "convnext_tiny",
)  # fmt: skip
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}


def lenet_twin(classes: int) -> nn.Module:
    layers = {
        "conv1": nn.Conv2d(1, 6, 5, padding=2), "norm1": nn.BatchNorm2d(6), "act1": nn.ReLU(), "pool1": nn.AvgPool2d(2),
        "conv2": nn.Conv2d(6, 16, 5), "norm2": nn.BatchNorm2d(16), "act2": nn.ReLU(), "pool2": nn.AvgPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(400, 120), "norm3": nn.BatchNorm1d(120), "act3": nn.ReLU(),
        "fc2": nn.Linear(120, 84), "norm4": nn.BatchNorm1d(84), "act4": nn.ReLU(),
        "fc3": nn.Linear(84, classes),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(layers))


def without_chance(model: nn.Module) -> nn.Module:
    """So that results can be compared."""
    for m in model.modules():
        if isinstance(m, nn.Dropout) or type(m).__name__ == "StochasticDepth":
            m.p = 0.0
    return model


def build(name: str, device: str, dtype: str, layout: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """fastnorm's network, torch.nn's, images, labels."""
    torch.manual_seed(0)
    classes = 10
    if name == "lenet_bn":
        ours, theirs = models.lenet_bn(num_classes=classes, activation="relu"), lenet_twin(classes)
        x = torch.randn(64, 1, 28, 28)
    elif name in FUSED_NETWORKS:
        theirs = without_chance(torchvision().models.get_model(name, num_classes=classes))
        ours = fuse(copy.deepcopy(theirs))
        x = torch.randn(FUSED_BATCH, 3, FUSED_SIZE, FUSED_SIZE)
    else:
        arguments = {"init_weights": False} if name == "googlenet" else {}
        ours = models.create(name, num_classes=classes, small_images=True, **arguments)
        theirs, x = twin(name, classes, small=True), torch.randn(BATCH, 3, SIZE, SIZE)
    ours.load_state_dict(theirs.state_dict())
    x = x.to(device, getattr(torch, dtype))
    ours, theirs = (without_chance(m).to(x) for m in (ours, theirs))
    if layout == "nhwc":
        ours, theirs, x = (t.to(memory_format=torch.channels_last) for t in (ours, theirs, x))
    return ours, theirs, x, torch.randint(classes, (len(x),), device=device)


def step(model: nn.Module, x: Tensor, labels: Tensor, saving: bool = False) -> Tensor:
    """A training step without the optimiser's part, so that it can be run again."""
    model.zero_grad()
    if saving:
        with save_memory():
            y = model(x)
    else:
        y = model(x)
    outputs = y if isinstance(y, tuple) else (y,)
    loss = sum(F.cross_entropy(o.float(), labels) for o in outputs)
    loss.backward()
    return loss.detach()


class Saving(nn.Module):
    """A network whose calls run under save_memory."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with save_memory():
            return self.model(x)


@lru_cache(maxsize=1)  # networks are large, and cases come one after another
def _runs(name: str, device: str, dtype: str, layout: str, against: tuple[str, ...]) -> dict[str, Callable]:
    ours, theirs, x, labels = build(name, device, dtype, layout)
    others = {a: torch.compile(theirs) if a == "compile" else theirs for a in against}

    def infer(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(x)

    kinds = {
        "training step": lambda m: step(m.train(), x, labels),
        "training step, save_memory": lambda m: step(m.train(), x, labels, m is ours),
        "inference": lambda m: infer(m.eval()),
    }
    # Inference is of the state that both were given: training steps count in each by themselves.
    state = {k: v.clone() for k, v in theirs.state_dict().items()}

    def run(what: str, model: nn.Module) -> Tensor:
        if what == "inference" and model.training:
            (model._orig_mod if hasattr(model, "_orig_mod") else model).load_state_dict(state)
        return kinds[what](model)

    return {
        what: {"ours": lambda w=what: run(w, ours), **{a: (lambda w=what, m=m: run(w, m)) for a, m in others.items()}}
        for what in kinds
    }


def cases(device: str, dtype: str, layout: str, against: list[str], quick: bool = False) -> Iterator[Case]:
    """Every network's training step, with and without save_memory, and inference."""
    fused = FUSED_NETWORKS if torchvision() else ()
    for name in (*QUICK_NETWORKS, *fused[:1]) if quick else (*NETWORKS, *fused):
        ours, theirs, x, _ = build(name, device, dtype, layout)
        before, shape, target = saved_bytes(theirs, x), tuple(x.shape), torch.empty_like(x)
        kept = {
            "training step": saved_bytes(ours, x) / before,
            "training step, save_memory": saved_bytes(Saving(ours), x) / before,
            "inference": None,
        }
        del ours, theirs
        key = (name, device, dtype, layout, tuple(against))
        for what, share in kept.items():
            about = what if share is None else f"{what} ({share:.2f}x bytes)"
            yield Case(
                name, shape, layout, dtype, about, 0, lambda k=key, w=what: _runs(*k)[w]["ours"](),
                {a: (lambda k=key, w=what, a=a: _runs(*k)[w][a]()) for a in against}, TOLERANCE[dtype],
                lambda t=target, x=x: t.copy_(x), 2 * x.numel() * x.element_size(),
            )  # fmt: skip
