"""torch.compile, torch.export, CUDA graphs and the operators' contracts with the dispatcher."""

import pytest
import torch
from test_nms import random_boxes

from fastnorm._check import CHECKS
from fastnorm.ops import batched_nms, nms, nms_padded, soft_nms


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_detection_in_one_graph(compiler, dynamic):
    torch._dynamo.reset()

    def detect(boxes, scores, idxs):
        keep = batched_nms(boxes * 2, scores, idxs, 0.4, score_threshold=0.1)
        again = nms(boxes[keep], scores[keep] + 1, 0.3, max_output=5)
        soft, updated = soft_nms(boxes, scores, 0.4, idxs=idxs)
        indices, count = nms_padded(boxes, scores, 0.5, 7)
        return boxes[keep] + 1, again, boxes[soft] * updated[:, None], indices.clamp(min=0), count

    compiled = torch.compile(detect, backend=compiler, fullgraph=True, dynamic=dynamic)
    for n in (50, 61, 70) if dynamic else (50, 50):
        boxes, scores = random_boxes(n)
        arguments = boxes, scores, torch.randint(3, (n,))
        torch.testing.assert_close(compiled(*arguments), detect(*arguments))


def test_export():
    class Detect(torch.nn.Module):
        def forward(self, boxes, scores):
            return boxes[nms(boxes, scores, 0.4)]

    n = torch.export.Dim("n", min=2)
    program = torch.export.export(Detect(), random_boxes(20), dynamic_shapes=({0: n}, {0: n}))
    for number in (20, 33):
        arguments = random_boxes(number)
        torch.testing.assert_close(program.module()(*arguments), Detect()(*arguments))


def test_meta_tensors():
    indices, count = nms_padded(torch.empty(2, 9, 4, device="meta"), torch.empty(2, 9, device="meta"), 0.5, 4)
    assert indices.shape == (2, 4) and count.shape == (2,) and indices.device.type == "meta"


def test_operators(backend):
    for operator, arguments in CHECKS["nms"].operators(backend.device, torch.float32):
        torch.library.opcheck(operator, arguments)


def test_nms_padded_in_a_cuda_graph(backend):
    if backend.name != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    images = [[t.cuda() for t in random_boxes(3000, seed=s)] for s in range(2)]
    boxes, scores = (t.clone() for t in images[0])
    idxs = torch.randint(3, (3000,), device="cuda")
    run = lambda b, s: nms_padded(b, s, 0.4, 500, idxs=idxs, score_threshold=0.1)  # noqa: E731
    run(boxes, scores)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(boxes, scores)
    for image in reversed(images):
        boxes.copy_(image[0]), scores.copy_(image[1])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, run(*image), strict=True))


def test_nms_padded_does_not_wait_for_the_gpu(backend):
    if backend.name != "cuda":
        pytest.skip("needs a GPU")
    boxes, scores = (t.cuda() for t in random_boxes(2000))
    nms_padded(boxes, scores, 0.4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        nms_padded(boxes, scores, 0.4, idxs=torch.zeros(2000, dtype=torch.int32, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
