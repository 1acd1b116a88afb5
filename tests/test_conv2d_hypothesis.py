"""Random shapes, strides and windows against float64, for every kernel that computes them."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import error
from test_batch_norm_hypothesis import SETTINGS, strided

from fastnorm.functional import conv2d


@st.composite
def problems(draw):
    """x, weight and bias; stride, padding, dilation and groups; dy's seed and a kernel."""
    groups, ci, co = draw(st.integers(1, 4)), draw(st.integers(1, 20)), draw(st.integers(1, 36))
    kernel, stride, dilation, padding = ([draw(st.integers(low, high)) for _ in range(2)]
                                         for low, high in ((1, 7), (1, 3), (1, 3), (0, 3)))  # fmt: skip
    algorithm = draw(st.sampled_from(["im2col", "direct", "depthwise", "winograd_2x2", "winograd"]))
    if algorithm == "direct":
        ci = min(ci, 4)
    if algorithm == "depthwise":
        groups, ci, co = ci, 1, 1
    if algorithm.startswith("winograd"):
        kernel, stride, dilation, padding = [3, 3], [1, 1], [1, 1], [min(p, 2) for p in padding]
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    image = [draw(st.integers(n, n + m)) for n, m in zip(least, (12, 50), strict=True)]
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    dtype = draw(st.sampled_from(dtypes[:3] if algorithm.startswith("winograd") else dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = draw(strided([draw(st.integers(1, 3)), groups * ci, *image], dtype, generator))
    weight = draw(strided([groups * co, ci, *kernel], dtype, generator))
    bias = draw(st.none() | st.just(torch.randn(groups * co, generator=generator).to(dtype)))
    return (x, weight, bias), (stride, padding, dilation, groups), generator, algorithm


@SETTINGS
@given(problems())
def test_against_float64(problem):
    tensors, window, generator, algorithm = problem
    dtype = tensors[0].dtype

    def results(function, inputs):
        leaves = [t if t is None else t.detach().requires_grad_() for t in inputs]
        y = function(*leaves, *window)
        return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]

    wide = [t if t is None else t.double().contiguous() for t in tensors]
    dy = torch.randn(F.conv2d(*wide, *window).shape, generator=generator).to(dtype)
    ours = results(lambda *a: conv2d(*a, algorithm=algorithm), tensors)
    tolerance = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 0.015}[dtype]
    if algorithm == "winograd":
        tolerance = max(tolerance, 5e-5)
    for name, a, b in zip(("y", "dx", "dweight", "dbias"), ours, results(F.conv2d, wide), strict=False):
        assert a.dtype == dtype
        assert error(a, b) < tolerance, f"{name}: {error(a, b):.2e}"
