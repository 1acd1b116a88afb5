"""Object detection from anchors: bright squares and discs are found on a photograph.

Anchors are centred on every pixel of a feature map; those that overlap an object are to predict its class and the
offsets of its box, the others background. Predicted boxes of low confidence are dropped, non-maximum suppression keeps
the best of those that overlap. The training images are patches of scikit-learn's sample photograph with an object
drawn on each; then all objects on a larger part of the photograph are found at once.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from common import arguments, axes, each, finding, save
from sklearn.datasets import load_sample_image
from torch import Tensor

import fastnorm.nn as nn
from fastnorm import ops

CLASSES = ("square", "disc")
SIZES, RATIOS = (0.35, 0.5), (1.0, 1.4, 0.7)
SIDE = 64


class Detector(nn.Module):
    """Convolutions with batch norm down to a map of a pixel for 8 x 8; classes and offsets of each pixel's anchors."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs, activation="relu"),
                nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs, activation="relu"),
                nn.MaxPool2d(2),
            ]  # fmt: skip
        self.body = nn.Sequential(*layers)
        self.anchors = len(SIZES) + len(RATIOS) - 1
        self.classes = nn.Conv2d(64, self.anchors * (1 + len(CLASSES)), 3, padding=1)
        self.offsets = nn.Conv2d(64, self.anchors * 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, A, 1 + classes), (B, 4 * A), and the anchors."""
        features = self.body(x)
        anchors = ops.multibox_prior(features, SIZES, RATIOS)
        classes = self.classes(features).permute(0, 2, 3, 1).reshape(len(x), -1, 1 + len(CLASSES))
        return classes, self.offsets(features).permute(0, 2, 3, 1).flatten(1), anchors


def draw(image: Tensor, kind: int, x: int, y: int, side: int) -> Tensor:
    """Draws an object into the image; returns its box in pixels."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    radius = (side - 1) / 2
    inside = (
        (rows - radius) ** 2 + (columns - radius) ** 2 <= (radius + 0.5) ** 2 if kind else torch.ones_like(rows) > 0
    )
    colour = torch.rand(3, 1) * 0.3 + torch.tensor([[0.7], [0.1], [0.7]])
    image[:, y : y + side, x : x + side][:, inside] = colour
    return torch.tensor([x, y, x + side, y + side], dtype=torch.float32)


def batch(photograph: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Images, and (B, 1, 5) labels: class and box as shares of the image."""
    images, labels = [], []
    for _ in range(count):
        top, left = (torch.randint(n - SIDE, ()).item() for n in photograph.shape[1:])
        image, kind = photograph[:, top : top + SIDE, left : left + SIDE].clone(), torch.randint(2, ()).item()
        side = torch.randint(20, 33, ()).item()
        x, y = torch.randint(SIDE - side + 1, (2,)).tolist()
        box = draw(image, kind, x, y, side) / SIDE
        images.append(image)
        labels.append(torch.cat([torch.tensor([float(kind)]), box]))
    return torch.stack(images), torch.stack(labels).unsqueeze(1)


def loss_of(model: Detector, images: Tensor, labels: Tensor) -> Tensor:
    classes, offsets, anchors = model(images)
    wanted, mask, target = ops.multibox_target(anchors, labels)
    # Most anchors are background: the objects' count as much as all of those together.
    weight = torch.where(target > 0, (target == 0).sum() / (target > 0).sum(), 1.0)
    class_loss = (F.cross_entropy(classes.transpose(1, 2), target, reduction="none") * weight).sum() / weight.sum()
    return class_loss + F.l1_loss(offsets * mask, wanted * mask, reduction="sum") / mask.sum()


@torch.no_grad()
def detect(model: Detector, images: Tensor, confidence: float) -> list[Tensor]:
    """(count, 6) of each image: class, confidence, box; by decreasing confidence."""
    classes, offsets, anchors = model.eval()(images)
    found = ops.multibox_detection(classes.softmax(-1).transpose(1, 2), offsets, anchors, 0.3, confidence)
    return [rows[rows[:, 0] >= 0] for rows in found]


def main() -> None:
    args = arguments(__doc__, steps=(300, 60))
    photograph = torch.from_numpy(load_sample_image("china.jpg")).float().permute(2, 0, 1) / 255
    photograph = F.interpolate(photograph[None], scale_factor=0.5, mode="area")[0]
    model = Detector()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=args.steps)
    losses = []
    for _ in (bar := each(range(args.steps), "training")):
        optimizer.zero_grad()
        loss = loss_of(model.train(), *batch(photograph, 16))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")

    images, labels = batch(photograph, 100)
    hits = overlap = 0.0
    for rows, label in zip(detect(model, images, 0.5), labels, strict=True):
        if len(rows):
            iou = ops.box_iou(rows[:1, 2:], label[:, 1:]).item()
            overlap += iou / len(labels)
            hits += (iou > 0.5 and rows[0, 0] == label[0, 0]).item() / len(labels)
    print(f"of {len(labels)} new images: right class and IoU above 0.5 in {hits:.0%}, mean IoU {overlap:.2f}")

    figure, (left, right) = axes(2, "objects found on the photograph")
    left.plot(losses)
    left.set_xlabel("step")
    left.set_ylabel("loss")
    show(model, photograph, right)
    save(figure, args, __file__)
    finding("the detector finds the objects", hits > 0.8 and overlap > 0.6)


def show(model: Detector, photograph: Tensor, axis: plt.Axes) -> None:
    """Finds several objects, in windows of the size that it was trained on, and draws them."""
    scene = photograph[:, : 3 * SIDE, : 4 * SIDE].clone()
    windows = [(r * SIDE, c * SIDE) for r in range(3) for c in range(4)]
    for i, (top, left) in enumerate(windows):
        if i % 2 == 0:
            draw(scene, i // 2 % 2, left + 8 + i, top + 20 - i, 24 + i % 5)
    found = detect(model, torch.stack([scene[:, r : r + SIDE, c : c + SIDE] for r, c in windows]), 0.9)
    axis.imshow(scene.permute(1, 2, 0))
    axis.axis("off")
    for (top, left), rows in zip(windows, found, strict=True):
        for kind, confidence, *box in rows.tolist():
            x1, y1, x2, y2 = (SIDE * v for v in box)
            axis.add_patch(plt.Rectangle((left + x1, top + y1), x2 - x1, y2 - y1, fill=False, color="red"))
            axis.text(left + x1, top + y1, f"{CLASSES[int(kind)]} {confidence:.2f}", color="red", fontsize=7)


if __name__ == "__main__":
    main()
