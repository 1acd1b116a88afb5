"""Which of max-pooling's CUDA kernels runs for which size, and that each gives the same in every order of threads."""

import cuda_plan
import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import SCHEDULES, configure, library, unavailable_reason
from cuda_plan import DTYPES, H200

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

PLAN = r"""
using namespace fastnorm;
void print_plan() {
  const auto& n = numbers;
  auto axis = [&](int size) {
    const int k = n[3], s = n[4], p = n[5], out = (size + 2 * p - k + (n[6] ? s - 1 : 0)) / s + 1;
    return PoolAxis{size, out, k, s, p, 1};
  };
  const PoolShape shape = n[7] ? PoolShape{4, n[0], axis(n[1]), axis(n[2])}
                               : PoolShape{4 * n[0], 1, axis(n[1]), axis(n[2])};
  with_type(DType(n[8]), [&](auto zero) {
    std::printf("{\"way\": %d}\n", int(way_of<decltype(zero)>(shape, pointer(n[9]), pointer(0), pointer(0))));
    return cudaSuccess;
  });
}
"""
ELEMENTS, CHANNELS, PLANES = 0, 1, 2
RESNET, VGG, INCEPTION, GOOGLENET = (3, 2, 1, False), (2, 2, 0, False), (3, 1, 1, False), (3, 2, 0, True)


def way(c, height, width, window, channels_last=False, dtype=torch.float32, offset=0):
    numbers = (c, height, width, *window, channels_last, DTYPES.index(dtype), offset)
    return cuda_plan.plan("max_pool2d", "max_pool2d_forward.cu", PLAN, H200, *numbers)["way"]


def test_networks_have_16_byte_kernels():
    for dtype in (torch.float32, torch.bfloat16):
        assert way(64, 112, 112, RESNET, dtype=dtype) == PLANES
        assert way(64, 224, 224, VGG, dtype=dtype) == way(128, 112, 112, VGG, dtype=dtype) == PLANES
        assert way(192, 112, 112, GOOGLENET, dtype=dtype) == PLANES
        for window in (RESNET, VGG, INCEPTION, GOOGLENET, (5, 3, 2, False)):
            assert way(64, 56, 56, window, True, dtype) == CHANNELS
    assert way(192, 28, 28, INCEPTION) == PLANES


def test_what_has_no_whole_vectors_goes_by_elements():
    assert way(64, 55, 55, (3, 2, 0, False)) == ELEMENTS  # AlexNet: 27 columns
    assert way(64, 57, 57, (3, 2, 0, False)) == ELEMENTS  # 28 columns, but windows that end before the row does
    assert way(512, 14, 14, VGG) == ELEMENTS
    assert way(64, 112, 112, RESNET, offset=4) == ELEMENTS
    assert way(64, 112, 112, (17, 2, 1, False)) == ELEMENTS  # offsets of two bytes
    assert way(6, 28, 28, VGG, True) == ELEMENTS


# shape, window, channels_last, what must run
CASES = {
    "planes, 3x3 s2 p1": ((2, 3, 9, 16), RESNET, False, PLANES),
    "planes, 2x2 s2": ((2, 3, 7, 16), VGG, False, PLANES),
    "planes, 3x3 s1 p1": ((2, 3, 5, 8), INCEPTION, False, PLANES),
    "planes, 3x3 s2 ceil": ((2, 3, 8, 16), GOOGLENET, False, PLANES),
    "channels, 3x3": ((2, 16, 6, 7), RESNET, True, CHANNELS),
    "channels, 2x2": ((2, 8, 6, 7), VGG, True, CHANNELS),
    "channels, 4x4": ((2, 8, 9, 7), (4, 3, 2, False), True, CHANNELS),
    "elements": ((2, 3, 9, 11), RESNET, False, ELEMENTS),
    "elements, channels_last": ((2, 5, 9, 11), RESNET, True, ELEMENTS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_variant_is_right(case, dtype):
    shape, window, channels_last, must = CASES[case]
    assert way(*shape[1:], window, channels_last, dtype) == must
    library()
    torch.manual_seed(1)
    x = (
        torch.randint(-4, 5, shape)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    )
    kernel, stride, padding, ceil = window
    z, right = F.max_pool2d(x, kernel, stride, padding, 1, ceil, return_indices=True)
    dy = torch.randn_like(z)
    arguments = ([kernel], [stride], [padding], [1])
    results = []
    try:
        for schedule, blocks_at_once in zip(SCHEDULES, (1, 3, 5), strict=True):
            configure(schedule, 5, blocks_at_once)
            y, offset, indices = torch.ops.fastnorm_emu.max_pool2d_forward(x, *arguments, ceil, True, True)
            dx = torch.ops.fastnorm_emu.max_pool2d_backward(dy, offset, *shape[2:], *arguments, channels_last)
            results.append((y, indices, dx, offset))
    finally:
        configure()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.max_pool2d(leaf, kernel, stride, padding, 1, ceil), leaf, dy)
    for y, indices, dx, offset in results:
        assert torch.equal(y, z) and torch.equal(indices, right) and torch.equal(dx, expected)
        assert torch.equal(offset, results[0][3])
