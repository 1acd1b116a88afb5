"""Which of layer norm's CUDA kernels runs for which size, and that each of them gives what the formula does."""

import cuda_plan
import pytest
import torch
from cuda_emulator import SCHEDULES, configure, library, unavailable_reason
from cuda_plan import A100, DTYPES, H200, T4

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

FORWARD = r"""
using namespace fastnorm;
void print_plan() {
  LayerNormForward a{};
  a.outer = numbers[0], a.cols = numbers[1], a.inner = numbers[2], a.dtype = DType(numbers[3]);
  a.x = pointer(numbers[4]), a.y = pointer(0), a.residual = numbers[5] ? pointer(0) : nullptr;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.inner > 1) {
      const ColumnTiles t = ColumnForwardPlan<T>(a).tiles;
      std::printf("{\"resident\": %d, \"width\": %d, \"wide\": %d}\n", t.resident, t.width, t.wide);
    } else {
      const auto plan = row_plan<T>(a);
      const Rows& t = plan.resident.parts ? plan.resident : plan.streamed;
      std::printf("{\"resident\": %d, \"parts\": %d, \"team\": %d, ", plan.resident.parts > 0, t.parts, t.team);
      std::printf("\"tensors\": %d, \"wide\": %d, \"whole\": %d}\n", t.tensors, t.wide, t.whole);
    }
  });
}
"""
BACKWARD = r"""
using namespace fastnorm;
void print_plan() {
  LayerNormBackward a{};
  a.outer = numbers[0], a.cols = numbers[1], a.inner = numbers[2], a.dtype = DType(numbers[3]);
  a.x = a.dy = pointer(numbers[4]), a.dx = a.dweight = a.dbias = pointer(0);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.inner > 1) {
      const ColumnBackwardPlan<T> plan(a);
      std::printf("{\"resident\": %d, \"blocks\": %ld, ", plan.tiles.resident, long(plan.blocks));
      std::printf("\"shared\": %d, \"width\": %d}\n", plan.sums_in_shared, plan.tiles.width);
    } else {
      const RowBackwardPlan<T> plan(a);
      std::printf("{\"resident\": %d, \"team\": %d, ", plan.resident, plan.rows.team);
      std::printf("\"stages\": %d, \"parts\": %ld}\n", plan.resident ? plan.rows.tensors / 2 : 0, long(plan.parts));
    }
  });
}
"""


def forward_plan(device, outer, cols, inner=1, dtype=torch.float32, offset=0, residual=0):
    numbers = (outer, cols, inner, DTYPES.index(dtype), offset, residual)
    return cuda_plan.plan("layer_norm_forward", "layer_norm_forward.cu", FORWARD, device, *numbers)


def backward_plan(device, outer, cols, inner=1, dtype=torch.float32, offset=0):
    numbers = (outer, cols, inner, DTYPES.index(dtype), offset)
    return cuda_plan.plan("layer_norm_backward", "layer_norm_backward.cu", BACKWARD, device, *numbers)


def test_rows_of_networks_are_read_once():
    for device in (H200, A100, T4):
        for cols in (64, 768, 1024, 4096, 8192, 12288):
            assert forward_plan(device, 4096, cols, dtype=torch.bfloat16) | {"team": 0, "tensors": 0} == {
                "resident": 1, "parts": 1, "team": 0, "tensors": 0, "wide": 1, "whole": 1,
            }  # fmt: skip
            if device == H200:
                assert backward_plan(device, 4096, cols, dtype=torch.bfloat16)["resident"]
    assert backward_plan(H200, 4096, 4096, dtype=torch.bfloat16)["stages"] == 2
    assert backward_plan(A100, 4096, 8192)["resident"]


def test_large_rows():
    assert forward_plan(H200, 8, 150_528)["parts"] == 16  # three colours of 224 x 224
    assert forward_plan(A100, 8, 40_000)["resident"]  # 160 KB, of 163
    assert not forward_plan(A100, 8, 150_528)["resident"]
    assert not forward_plan(H200, 8, 1_000_000)["resident"]
    assert not backward_plan(H200, 8, 150_528)["resident"]


def test_columns():
    assert forward_plan(H200, 32, 96, 3136) == {"resident": 1, "width": 8, "wide": 1}
    assert forward_plan(H200, 32, 768, 49) == {"resident": 1, "width": 4, "wide": 0}
    assert not forward_plan(T4, 32, 5000, 49)["resident"]
    assert backward_plan(H200, 32, 96, 3136)["resident"]


@pytest.mark.parametrize("cols, inner", [(7, 1), (768, 1), (20_000, 1), (150_528, 1), (2_000_000, 1), (96, 784)])
def test_order_of_sums_does_not_depend_on_the_batch_or_alignment(cols, inner):
    for dtype in DTYPES:
        chosen = [forward_plan(H200, n, cols, inner, dtype, offset) for n, offset in ((1, 0), (99, 0), (7, 8))]
        for other in chosen[1:]:
            assert other | {"wide": 0} == chosen[0] | {"wide": 0}
    teams = [backward_plan(H200, n, cols, inner) | {"parts": 0, "blocks": 0} for n in (1, 1000)]
    assert teams[0] == teams[1]


# What each of them is, shape, what of the plans must be so, multiprocessors and compute capability of the emulator.
CASES = {
    "one element": ((9, 1), {"team": 2}, {"team": 2, "stages": 2}, 4, 90),
    "part of a warp": ((70, 40), {"team": 4}, {"team": 4, "stages": 2}, 4, 90),
    "warp, odd": ((21, 333), {"team": 32, "whole": 0, "wide": 0}, {"team": 32}, 4, 90),
    "block": ((5, 3000), {"team": 128, "parts": 1, "tensors": 2}, {"team": 512, "stages": 2}, 4, 90),
    "block, large": ((3, 14_000), {"team": 256, "parts": 1, "tensors": 1}, {"stages": 1}, 4, 90),
    "cluster": ((3, 24_000), {"parts": 2}, {"resident": 0}, 4, 90),
    "cluster, odd": ((2, 80_003), {"parts": 8, "whole": 0}, {"resident": 0}, 4, 90),
    "one block of an older device": ((2, 24_000), {"parts": 1, "team": 256}, {"resident": 0}, 4, 80),
    "streamed": ((2, 40_000), {"resident": 0}, {"resident": 0}, 4, 75),
    "streamed, odd": ((3, 26_001), {"resident": 0}, {"resident": 0}, 4, 75),
    "columns": ((3, 24, 40), {"resident": 1, "width": 8}, {"resident": 1, "shared": 1}, 4, 90),
    "columns, odd": ((3, 30, 7), {"resident": 1, "wide": 0, "width": 2}, {"resident": 1, "shared": 1}, 4, 90),
    "columns, streamed": ((1, 2100, 19), {"resident": 0}, {"resident": 0, "shared": 1}, 4, 75),
    "columns, many": ((2, 9000, 9), {"resident": 0}, {"resident": 0, "shared": 0}, 4, 75),
}


def run(shape, x, addend, residual, weight, bias, dy, dsum, activation="relu", rms=False):
    operators = torch.ops.fastnorm_emu
    normalized, save_mask = [shape[1]], residual is not None
    y, h, stats, mask = operators.layer_norm_forward(
        x, addend, residual, weight, bias, normalized, 1, rms, 1e-5, activation, 0.0, save_mask
    )
    gradients = operators.layer_norm_backward(
        dy, x if addend is None else h, None, weight, bias, stats, mask, dsum, normalized, 1, rms, 1e-5, activation,
        0.0, [True] * 4,
    )  # fmt: skip
    return [y, h, mask, *gradients]


def expected(x, addend, residual, weight, bias, dy, dsum, on, rms=False):
    inputs = [t.double().requires_grad_() for t in (x + addend, residual, weight, bias)]
    h, scale = inputs[0], (1, -1) + (1,) * (x.dim() - 2)
    mean = 0 if rms else h.mean(1, keepdim=True)
    z = (h - mean) / ((h - mean).square().mean(1, keepdim=True) + 1e-5).sqrt()
    z = z * inputs[2].view(scale) + inputs[3].view(scale) + inputs[1]
    gradients = list(torch.autograd.grad(z, inputs, dy.double() * on))  # where z is about 0, either slope is right
    gradients[0] += dsum.double()
    return [z.detach().relu(), *gradients]


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("case", CASES)
def test_variant_is_right(case, rms):
    shape, forward, backward, *device = CASES[case]
    chosen = forward_plan(tuple(device), *shape, residual=1)
    assert chosen | forward == chosen
    chosen = backward_plan(tuple(device), *shape)
    assert chosen | backward == chosen

    library()
    torch.manual_seed(1)
    x, addend, residual, dy, dsum = torch.randn(5, *shape)
    weight, bias = torch.rand(2, shape[1]).add(0.5)
    arguments = (x, addend, residual, weight, bias, dy, dsum)
    results = []
    try:
        for schedule, blocks_at_once in zip(SCHEDULES, (1, 3, 5), strict=True):
            configure(schedule, 5, blocks_at_once, *device)
            results.append(run(shape, *arguments, rms=rms))
    finally:
        configure()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    y, h, _, *gradients = results[0]
    assert torch.equal(h, x + addend)
    for actual, right in zip([y, *gradients], expected(*arguments, y > 0, rms), strict=True):
        torch.testing.assert_close(actual.double(), right, atol=1e-5 * float(right.abs().max()), rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_row_does_not_depend_on_its_batch(case):
    (outer, cols, *inner), _, _, *device = CASES[case]
    library()
    torch.manual_seed(2)
    x, addend, residual, dy, dsum = torch.randn(5, outer, cols, *inner)
    weight, bias = torch.rand(2, cols).add(0.5)
    try:
        configure("forward", 1, 1, *device)
        y, h, _, dx, dresidual, *_ = run((outer, cols), x, addend, residual, weight, bias, dy, dsum)
        last = [t[-1:].clone() for t in (x, addend, residual)]
        dlast = [t[-1:].clone() for t in (dy, dsum)]
        configure("forward", 1, 1, 16, device[1])
        alone = run((1, cols), *last, weight, bias, *dlast)
    finally:
        configure()
    for batch, single in zip((y, h, dx, dresidual), (alone[0], alone[1], alone[3], alone[4]), strict=True):
        assert torch.equal(batch[-1:], single)


@pytest.mark.parametrize("case", CASES)
def test_hard_values(case):
    """Sums that overflow float32, a mean far from 0, and a row of NaN beside others."""
    (outer, cols, *inner), _, _, *device = CASES[case]
    library()
    torch.manual_seed(3)
    base = torch.randn(outer, cols, *inner)
    dy = torch.randn_like(base)
    try:
        configure("random", 1, 1, *device)
        for x in (base * 1e30, base * 1e37, base + 1e4):
            y, *_ = torch.ops.fastnorm_emu.layer_norm_forward(
                x, None, None, None, None, [cols], 1, False, 1e-5, "none", 0.0, False
            )
            right = torch.nn.functional.layer_norm(x.double().movedim(1, -1), [cols]).movedim(-1, 1)
            torch.testing.assert_close(y.double(), right, atol=2e-5, rtol=2e-5)
            y, *_ = torch.ops.fastnorm_emu.layer_norm_forward(
                x, None, None, None, None, [cols], 1, True, 1e-5, "none", 0.0, False
            )
            right = torch.nn.functional.rms_norm(x.double().movedim(1, -1), [cols], eps=1e-5).movedim(-1, 1)
            torch.testing.assert_close(y.double(), right, atol=2e-5, rtol=2e-5)
        x = base.clone()
        x[0, -1] = float("nan")
        y, _, _, dx, *_ = run((outer, cols), x, None, None, None, None, dy, None, "none")
    finally:
        configure()
    assert y[0].isnan().all() and dx[0].isnan().all()
    assert y[1:].isfinite().all() and dx[1:].isfinite().all()
