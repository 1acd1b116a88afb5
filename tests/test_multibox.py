"""multibox_prior, multibox_target and multibox_detection against loops over single numbers, on every backend."""

import math

import pytest
import torch
from test_nms import run

from fastnorm.ops import multibox_detection, multibox_prior, multibox_target


def overlap(a, b):
    both = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def centered(box):
    return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]]


def random_boxes(*shape):
    corner = torch.rand(*shape, 2, dtype=torch.float64) * 0.7
    return torch.cat([corner, corner + 0.05 + torch.rand(*shape, 2, dtype=torch.float64) * 0.3], -1)


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (6, 4)])
def test_prior(backend, height, width):
    sizes, ratios = [0.75, 0.5, 0.25], [1, 2, 0.5]
    expected = []
    for row in range(height):
        for column in range(width):
            pairs = [(s, ratios[0]) for s in sizes] + [(sizes[0], r) for r in ratios[1:]]
            for size, ratio in pairs:  # in pixels: the height is the unit of sizes
                w, h = size * height * math.sqrt(ratio), size * height / math.sqrt(ratio)
                x, y = column + 0.5, row + 0.5
                corners = (x - w / 2) / width, (y - h / 2) / height, (x + w / 2) / width, (y + h / 2) / height
                expected.append(corners)
    expected = torch.tensor([expected], dtype=torch.float64)
    image = torch.empty(2, 3, height, width, device=backend.device)
    anchors = multibox_prior(image, sizes, ratios)
    assert anchors.device.type == backend.device and anchors.dtype == torch.float32
    torch.testing.assert_close(anchors.cpu().double(), expected, atol=1e-6, rtol=0)
    exact = multibox_prior((height, width), sizes, ratios, device=backend.device, dtype=torch.float64)
    torch.testing.assert_close(exact.cpu(), expected)


def target_of(anchors, labels, threshold):
    """One image; labels without padding."""
    iou = {(a, g): overlap(anchors[a], labels[g][1:]) for a in range(len(anchors)) for g in range(len(labels))}
    assigned = {}
    left = dict(iou)
    while left:
        a, g = max(left, key=lambda pair: (left[pair], -pair[0], -pair[1]))
        assigned[a] = g
        left = {pair: v for pair, v in left.items() if pair[0] != a and pair[1] != g}
    for a in range(len(anchors)):
        if a not in assigned and labels:
            g = max(range(len(labels)), key=lambda g: (iou[a, g], -g))
            if iou[a, g] >= threshold:
                assigned[a] = g
    offsets, mask, classes = [], [], []
    for a, anchor in enumerate(anchors):
        if a not in assigned:
            offsets += [0.0] * 4
            mask += [0.0] * 4
            classes.append(0)
            continue
        label = labels[assigned[a]]
        (xa, ya, wa, ha), (x, y, w, h) = centered(anchor), centered(label[1:])
        offsets += [10 * (x - xa) / wa, 10 * (y - ya) / ha, 5 * math.log(w / wa + 1e-6), 5 * math.log(h / ha + 1e-6)]
        mask += [1.0] * 4
        classes.append(int(label[0]) + 1)
    return offsets, mask, classes


@pytest.mark.parametrize("objects", [0, 1, 3, 6])
@pytest.mark.parametrize("anchors", [1, 4, 60])
def test_target(backend, anchors, objects):
    """A batch in which images have fewer and fewer objects; also more objects than anchors."""
    anchors = random_boxes(anchors)
    labels = torch.full((4, objects, 5), -1.0, dtype=torch.float64)
    for i in range(4):
        there = torch.randperm(objects)[: max(objects - 2 * i, 0)]  # padding is anywhere
        labels[i, there] = torch.cat([torch.randint(9, (len(there), 1)), random_boxes(len(there))], 1)
    results = run(backend, multibox_target, anchors[None], labels, 0.4)
    for i in range(4):
        real = [label for label in labels[i].tolist() if label[0] >= 0]
        expected = target_of(anchors.tolist(), real, 0.4)
        assert results[2][i].dtype == torch.int64 and results[2][i].tolist() == expected[2]
        for result, right in zip(results[:2], expected, strict=False):
            torch.testing.assert_close(result[i], torch.tensor(right, dtype=torch.float64))


def test_target_of_a_known_picture(backend):
    """The course's example: a dog and a cat, five anchors, one of which is assigned by threshold alone."""
    labels = torch.tensor([[[0, 0.1, 0.08, 0.52, 0.92], [1, 0.55, 0.2, 0.9, 0.88]]])
    anchors = [[0, 0.1, 0.2, 0.3], [0.15, 0.2, 0.4, 0.4], [0.63, 0.05, 0.88, 0.98], [0.66, 0.45, 0.8, 0.8]]
    anchors = torch.tensor([*anchors, [0.57, 0.3, 0.92, 0.9]])
    offsets, mask, classes = run(backend, multibox_target, anchors, labels)
    assert classes.tolist() == [[0, 1, 2, 0, 2]]
    assert mask.view(5, 4)[:, 0].tolist() == [0, 1, 1, 0, 1]
    expected = [[0] * 4, [1.4, 10, 2.59, 7.18], [-1.2, 0.269, 1.68, -1.57], [0] * 4, [-0.571, -1, -8.94e-07, 0.626]]
    torch.testing.assert_close(offsets.view(5, 4), torch.tensor(expected), atol=5e-3, rtol=0)


def detection_of(probabilities, offsets, anchors, nms_threshold, pos_threshold):
    """One image: rows of class, confidence, box."""
    rows = []
    for a, anchor in enumerate(anchors):
        column = [row[a] for row in probabilities[1:]]
        confidence = max(column)
        x, y, w, h = centered(anchor)
        dx, dy, dw, dh = offsets[4 * a : 4 * a + 4]
        x, y, w, h = x + dx * w / 10, y + dy * h / 10, w * math.exp(dw / 5), h * math.exp(dh / 5)
        rows.append([column.index(confidence), confidence, x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    keep = []
    for a in sorted(range(len(rows)), key=lambda a: -rows[a][1]):
        if all(overlap(rows[k][2:], rows[a][2:]) <= nms_threshold for k in keep):
            keep.append(a)
    rest = [a for a in range(len(rows)) if a not in keep]
    for a in rest:
        rows[a][0] = -1
    for row in rows:
        if row[1] < pos_threshold:
            row[:2] = -1, 1 - row[1]
    return [rows[a] for a in keep + rest]


@pytest.mark.parametrize("anchors", [1, 3, 70])
@pytest.mark.parametrize("classes", [1, 3])
def test_detection(backend, anchors, classes):
    anchors = random_boxes(anchors)
    probabilities = torch.rand(3, 1 + classes, len(anchors), dtype=torch.float64).softmax(1)
    probabilities[:, :, ::5] *= 0.2
    offsets = torch.randn(3, 4 * len(anchors), dtype=torch.float64)
    result = run(backend, multibox_detection, probabilities, offsets, anchors[None], 0.3, 0.1)
    for i in range(3):
        right = detection_of(probabilities[i].tolist(), offsets[i].tolist(), anchors.tolist(), 0.3, 0.1)
        torch.testing.assert_close(result[i], torch.tensor(right, dtype=torch.float64))


def test_targets_lead_back_to_the_boxes(backend):
    """A detector that predicts exactly the targets finds the objects."""
    anchors = multibox_prior((8, 8), [0.3, 0.2], [1, 2, 0.5])
    labels = torch.tensor([[[1, 0.1, 0.1, 0.4, 0.35], [0, 0.5, 0.6, 0.8, 0.95]], [[2, 0.3, 0.3, 0.6, 0.7], [-1] * 5]])
    offsets, _, classes = run(backend, multibox_target, anchors, labels)
    probabilities = torch.nn.functional.one_hot(classes, 4).movedim(-1, 1) * 0.9 + 0.001
    found = run(backend, multibox_detection, probabilities, offsets, anchors)
    for i, objects in enumerate((2, 1)):
        kept = found[i][found[i][:, 0] >= 0]
        assert len(kept) == objects
        expected = labels[i, :objects]
        kept = kept[kept[:, 0].argsort()]
        torch.testing.assert_close(kept[:, [0, 2, 3, 4, 5]], expected[expected[:, 0].argsort()], atol=1e-5, rtol=0)


def test_compiled_in_one_graph():
    anchors = multibox_prior((4, 5), [0.5], [1, 2])

    def both(labels, probabilities):
        offsets, mask, classes = multibox_target(anchors, labels)
        return multibox_detection(probabilities, offsets, anchors), mask, classes, multibox_prior(labels, [0.2], [1])

    labels = torch.cat([torch.zeros(2, 3, 1), random_boxes(2, 3).float()], -1)
    arguments = labels, torch.rand(2, 3, anchors.shape[1])
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), both(*arguments))


def test_wrong_arguments():
    anchors = random_boxes(4)
    for sizes, ratios, name in (([], [1], "sizes"), ([0.5], [0], "ratios")):
        with pytest.raises(ValueError, match=f"multibox_prior: {name} must be positive numbers"):
            multibox_prior((2, 2), sizes, ratios)
    with pytest.raises(RuntimeError, match=r"multibox_target: labels must have shape \(B, G, 5\), got \(2, 3, 4\)"):
        multibox_target(anchors, torch.zeros(2, 3, 4))
    with pytest.raises(RuntimeError, match=r"anchors must have shape \(1, A, 4\) or \(A, 4\), got \(2, 4, 4\)"):
        multibox_target(anchors[None].expand(2, 4, 4), torch.zeros(2, 3, 5))
    with pytest.raises(RuntimeError, match=r"cls_probs must have shape \(B, 1 \+ C, 4\), got \(1, 3, 5\)"):
        multibox_detection(torch.zeros(1, 3, 5), torch.zeros(1, 16), anchors)
    with pytest.raises(RuntimeError, match=r"offset_preds must have shape \(1, 16\), got \(1, 12\)"):
        multibox_detection(torch.zeros(1, 3, 4), torch.zeros(1, 12), anchors)
