"""Which of group norm's CUDA kernels runs for which size, and that each of them gives what the formula does."""

import cuda_plan
import pytest
import torch
from cuda_emulator import SCHEDULES, configure, library, unavailable_reason
from cuda_plan import A100, DTYPES, H200, T4

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

FORWARD = r"""
using namespace fastnorm;
void print_plan() {
  GroupNormForward a{};
  a.n = numbers[0], a.c = numbers[1], a.hw = numbers[2], a.groups = numbers[3], a.channels_last = numbers[4];
  a.dtype = DType(numbers[5]), a.x = pointer(numbers[6]), a.y = pointer(0);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.channels_last) {
      const TileForwardPlan<T> plan(a);
      const Tiles& t = plan.resident.parts ? plan.resident : plan.streamed;
      std::printf("{\"resident\": %d, \"parts\": %d, ", plan.resident.parts > 0, t.parts);
      std::printf("\"folds\": %d, \"copies\": %d, \"wide\": %d}\n", t.folds, t.copies, !t.scalar);
    } else {
      const auto plan = row_plan<T>(a);
      const Rows& t = plan.resident.parts ? plan.resident : plan.streamed;
      std::printf("{\"resident\": %d, \"parts\": %d, ", plan.resident.parts > 0, t.parts);
      std::printf("\"team\": %d, \"wide\": %d}\n", t.team, t.wide);
    }
  });
}
"""
BACKWARD = r"""
using namespace fastnorm;
void print_plan() {
  GroupNormBackward a{};
  a.n = numbers[0], a.c = numbers[1], a.hw = numbers[2], a.groups = numbers[3], a.channels_last = numbers[4];
  a.dtype = DType(numbers[5]), a.x = a.dy = pointer(numbers[6]), a.dx = a.dweight = a.dbias = pointer(0);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.channels_last) {
      const TileBackwardPlan<T, false> plan(a);
      const Tiles& t = plan.resident.parts ? plan.resident : plan.streamed;
      std::printf("{\"resident\": %d, \"parts\": %d, ", plan.resident.parts > 0, t.parts);
      std::printf("\"wide\": %d}\n", !t.scalar);
    } else {
      const PlaneBackwardPlan<T, false> plan(a);
      const Rows& t = plan.resident.parts ? plan.resident : plan.planes;
      std::printf("{\"resident\": %d, \"parts\": %d, ", plan.resident.parts > 0, t.parts);
      std::printf("\"team\": %d, \"wide\": %d}\n", t.team, t.wide);
    }
  });
}
"""


def forward_plan(device, n, c, hw, groups, channels_last=False, dtype=torch.float32, offset=0):
    numbers = (n, c, hw, groups, channels_last, DTYPES.index(dtype), offset)
    return cuda_plan.plan("group_norm_forward", "group_norm_forward.cu", FORWARD, device, *numbers)


def backward_plan(device, n, c, hw, groups, channels_last=False, dtype=torch.float32, offset=0):
    numbers = (n, c, hw, groups, channels_last, DTYPES.index(dtype), offset)
    return cuda_plan.plan("group_norm_backward", "group_norm_backward.cu", BACKWARD, device, *numbers)


@pytest.mark.parametrize("c, hw", [(64, 3136), (256, 3136), (128, 784), (512, 784), (256, 196), (2048, 49)])
def test_groups_of_resnet50_are_read_once(c, hw):
    for groups in (32, c):
        for dtype in (torch.float32, torch.bfloat16):
            for chosen in (
                forward_plan(H200, 32, c, hw, groups, dtype=dtype),
                backward_plan(H200, 32, c, hw, groups, dtype=dtype),
            ):
                assert chosen["resident"]
                assert chosen["wide"] == (hw * dtype.itemsize % 16 == 0)


def test_channels_last_is_read_once():
    for c, pixels in ((64, 3136), (320, 4096), (640, 1024), (1280, 256)):
        for dtype in (torch.float32, torch.bfloat16):
            assert forward_plan(H200, 2, c, pixels, 32, True, dtype)["resident"]
    assert backward_plan(H200, 2, 320, 4096, 32, True, torch.bfloat16)["resident"]
    assert not forward_plan(A100, 2, 64, 3136, 32, True)["resident"]


def test_large_groups():
    assert forward_plan(H200, 1, 128, 256 * 256, 32)["parts"] == 16  # 1 MB
    assert not forward_plan(A100, 1, 128, 256 * 256, 32)["resident"]
    assert not forward_plan(H200, 1, 128, 20 * 256 * 256, 32, dtype=torch.bfloat16)["resident"]  # a video
    assert not backward_plan(T4, 1, 128, 64 * 64, 32)["resident"]


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("c, hw, groups", [(64, 49, 32), (320, 4096, 32), (6, 12001, 2), (64, 65536, 1), (20, 1, 5)])
def test_order_of_sums_does_not_depend_on_the_batch_or_alignment(c, hw, groups, channels_last):
    for plan in (forward_plan, backward_plan):
        for dtype in DTYPES:
            first, *others = [
                plan(H200, n, c, hw, groups, channels_last, dtype, offset) for n, offset in ((1, 0), (99, 0), (7, 8))
            ]
            assert all(other | {"wide": 0} == first | {"wide": 0} for other in others)


# What each of them is, shape, groups, channels_last, what of the plans must be so, multiprocessors and compute
# capability of the emulator.
CASES = {
    "part of a warp": ((9, 6, 4), 6, False, {"team": 2}, {"team": 2}, 4, 90),
    "part of a warp, odd": ((7, 12, 7), 4, False, {"team": 2, "wide": 0}, {"team": 2}, 4, 90),
    "warp": ((3, 16, 64), 2, False, {"team": 32}, {"team": 32}, 4, 90),
    "block": ((2, 12, 676), 3, False, {"resident": 1, "team": 128}, {"resident": 1, "team": 128}, 4, 90),
    "block, many planes": ((2, 600, 9), 2, False, {"resident": 1, "team": 256}, {"resident": 1}, 4, 90),
    "block, one plane": ((2, 3, 5001), 3, False, {"resident": 1, "wide": 0}, {"resident": 1, "parts": 1}, 4, 90),
    "cluster": ((2, 4, 9800), 2, False, {"parts": 2}, {"parts": 4}, 4, 90),
    "cluster, odd": ((1, 3, 26001), 1, False, {"parts": 8}, {"parts": 16}, 4, 90),
    "streamed": ((2, 4, 10000), 2, False, {"resident": 0}, {"resident": 0, "parts": 1}, 4, 75),
    "streamed, odd": ((1, 2, 20001), 2, False, {"resident": 0}, {"resident": 0, "parts": 3}, 4, 75),
    "streamed, many planes": ((1, 700, 49), 1, False, {"resident": 0}, {"resident": 0, "team": 4}, 4, 75),
    "tiles": ((3, 24, 30), 4, True, {"resident": 1, "parts": 1, "wide": 1}, {"resident": 1, "parts": 1}, 4, 90),
    "tiles, slices": ((2, 120, 20), 3, True, {"resident": 1, "parts": 1}, {"resident": 1, "parts": 1}, 4, 90),
    "tiles, cluster": ((2, 64, 700), 8, True, {"resident": 1, "parts": 4}, {"resident": 1, "parts": 8}, 4, 90),
    "tiles, folded": ((3, 6, 35), 2, True, {"resident": 1, "folds": 4, "wide": 0}, {"resident": 1}, 4, 90),
    "tiles, folded, cluster": ((2, 12, 3001), 2, True, {"parts": 8, "folds": 2}, {"parts": 8}, 4, 90),
    "tiles, instances": ((3, 40, 33), 40, True, {"resident": 1, "folds": 1}, {"resident": 1}, 4, 90),
    "tiles, streamed": ((2, 64, 700), 8, True, {"resident": 0, "parts": 12}, {"resident": 0, "parts": 12}, 4, 75),
    "tiles, streamed, folded": ((1, 6, 4001), 2, True, {"resident": 0, "folds": 4}, {"resident": 0}, 4, 75),
    "tiles, streamed, copies": ((2, 2001, 20), 3, True, {"resident": 0, "copies": 8}, {"resident": 0}, 4, 90),
    "tiles, streamed, wide groups": ((1, 2048, 9), 1, True, {"resident": 0}, {"resident": 0}, 4, 90),
}


def tensors(shape, channels_last, count):
    """With two dimensions for hw, in the layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.randn(*shape, 1).contiguous(memory_format=layout) for _ in range(count)]


def run(x, residual, weight, bias, dy, groups, activation="relu"):
    operators = torch.ops.fastnorm_emu
    y, stats, mask = operators.group_norm_forward(
        x, residual, weight, bias, groups, 1e-5, activation, 0.0, residual is not None
    )
    gradients = operators.group_norm_backward(
        dy, x, None, weight, bias, stats, mask, groups, 1e-5, activation, 0.0, [True] * 4
    )
    return [y, stats, mask, *gradients]


def expected(x, residual, weight, bias, dy, groups, on):
    inputs = [t.double().requires_grad_() for t in (x, residual, weight, bias)]
    z = torch.nn.functional.group_norm(inputs[0], groups, *inputs[2:]) + inputs[1]
    return [z.detach().relu(), *torch.autograd.grad(z, inputs, dy.double() * on)]


@pytest.mark.parametrize("case", CASES)
def test_variant_is_right(case):
    shape, groups, channels_last, forward, backward, *device = CASES[case]
    for plan, must in ((forward_plan, forward), (backward_plan, backward)):
        chosen = plan(tuple(device), *shape, groups, channels_last)
        assert chosen | must == chosen

    library()
    torch.manual_seed(1)
    x, residual, dy = tensors(shape, channels_last, 3)
    weight, bias = torch.rand(2, shape[1]).add(0.5)
    results = []
    try:
        for schedule, blocks_at_once in zip(SCHEDULES, (1, 3, 5), strict=True):
            configure(schedule, 5, blocks_at_once, *device)
            results.append(run(x, residual, weight, bias, dy, groups))
    finally:
        configure()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    y, stats, _, *gradients = results[0]
    var = x.double().reshape(shape[0] * groups, -1).var(1, correction=0)
    torch.testing.assert_close(stats[3].double(), var, atol=0, rtol=2e-6)
    for actual, right in zip([y, *gradients], expected(x, residual, weight, bias, dy, groups, y > 0), strict=True):
        torch.testing.assert_close(actual.double(), right, atol=1e-5 * float(right.abs().max()), rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_sample_does_not_depend_on_its_batch(case):
    shape, groups, channels_last, _, _, *device = CASES[case]
    shape = (max(shape[0], 2), *shape[1:])
    library()
    torch.manual_seed(2)
    x, residual, dy = tensors(shape, channels_last, 3)
    weight, bias = torch.rand(2, shape[1]).add(0.5)
    try:
        configure("forward", 1, 1, *device)
        batch = run(x, residual, weight, bias, dy, groups)
        configure("forward", 1, 1, 16, device[1])
        alone = run(x[-1:].clone(), residual[-1:].clone(), weight, bias, dy[-1:].clone(), groups)
    finally:
        configure()
    for i in (0, 3, 4):  # y, dx, dresidual
        assert torch.equal(batch[i][-1:], alone[i])


@pytest.mark.parametrize("case", CASES)
def test_hard_values(case):
    """Sums that overflow float32, a mean far from 0, and a group with NaN beside others."""
    shape, groups, channels_last, _, _, *device = CASES[case]
    library()
    torch.manual_seed(3)
    base, dy = tensors(shape, channels_last, 2)
    try:
        configure("random", 1, 1, *device)
        for x in (base * 1e30, base * 1e37, base + 1e4):
            y, *_ = torch.ops.fastnorm_emu.group_norm_forward(x, None, None, None, groups, 1e-5, "none", 0.0, False)
            right = torch.nn.functional.group_norm(x.double(), groups)
            torch.testing.assert_close(y.double(), right, atol=2e-5, rtol=2e-5)
        x = base.clone()
        x[0, 0, -1] = float("nan")
        y, _, _, dx, *_ = run(x, None, None, None, dy, groups, "none")
    finally:
        configure()
    channels = shape[1] // groups
    for t in (y, dx):
        assert t[0, :channels].isnan().all()
        assert t[0, channels:].isfinite().all() and t[1:].isfinite().all()
