"""max_unpool2d against torch's, and what torch leaves open: which of several values for one place is taken."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, LAYOUTS, to_layout
from torch.autograd import gradcheck, gradgradcheck

from fastnorm.functional import max_unpool2d

EVERY_ISA = True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_torchs(backend, layout, dtype):
    for shape, window, size in (
        ((2, 3, 8, 8), (2,), None),
        ((2, 6, 9, 7), (3, 3), (9, 7)),
        ((1, 40, 8, 8), (3, 2, 1), (1, 40, 8, 8)),
        ((3, 8, 8), (2,), (9, 8)),
    ):
        x = to_layout(torch.randn(shape), layout).to(backend.device, dtype)
        pooled, indices = F.max_pool2d(x, *window, return_indices=True)
        y, z = (f(pooled, indices, *window, output_size=size) for f in (max_unpool2d, F.max_unpool2d))
        if x.dim() == 4 and layout == "channels_last":
            assert y.is_contiguous(memory_format=torch.channels_last)
        if window != (3, 2, 1):  # windows overlap: torch's CUDA takes any of the values, which are the same here
            assert torch.equal(y, z) and y.dtype == dtype
        leaves = [pooled.clone().requires_grad_() for _ in range(2)]
        dy = torch.randn_like(z)
        for leaf, f in zip(leaves, (max_unpool2d, F.max_unpool2d), strict=True):
            f(leaf, indices, *window, output_size=size).backward(dy)
        assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_value_counts(backend, layout, threads):
    x = to_layout(torch.arange(2 * 5 * 12 * 12.0).view(2, 5, 12, 12), layout).to(backend.device)
    indices = to_layout(torch.randint(0, 49, x.shape), layout).to(backend.device)
    expected = torch.zeros(2, 5, 64, device=backend.device)
    for i in range(144):
        expected.scatter_(2, indices.flatten(2)[..., i : i + 1], x.flatten(2)[..., i : i + 1])
    for count in (1, 3):
        threads(count)
        y = torch.ops.fastnorm.max_unpool2d(x, indices, [8, 8])
        assert torch.equal(y.flatten(2), expected)


def test_derivatives(backend):
    for layout in LAYOUTS:
        x = to_layout(torch.randn(2, 3, 4, 4, dtype=torch.float64, device=backend.device), layout).requires_grad_()
        indices = torch.stack([torch.randperm(64)[:16].view(4, 4) for _ in range(6)]).view(2, 3, 4, 4)
        indices = to_layout(indices, layout).to(backend.device)

        def function(x, indices=indices):
            return max_unpool2d(x, indices, 2)

        assert gradcheck(function, x, check_forward_ad=not backend.small, check_batched_grad=not backend.small)
        assert gradgradcheck(function, x)


def test_torch_func_and_compile():
    pooled, indices = torch.randn(5, 2, 3, 4, 4), torch.randint(0, 64, (5, 2, 3, 4, 4))
    each = torch.stack([max_unpool2d(p, i, 2) for p, i in zip(pooled, indices, strict=True)])
    assert torch.equal(torch.func.vmap(lambda p, i: max_unpool2d(p, i, 2))(pooled, indices), each)
    same = torch.stack([max_unpool2d(p, indices[0], 2) for p in pooled])
    assert torch.equal(torch.func.vmap(lambda p: max_unpool2d(p, indices[0], 2))(pooled), same)
    unbatched = torch.func.vmap(lambda p, i: max_unpool2d(p, i, 2))(pooled[0], indices[0])
    assert torch.equal(unbatched, each[0])

    def loss(p):
        return max_unpool2d(p, indices[0], 2).square().sum()

    z = torch.func.grad(lambda p: F.max_unpool2d(p, indices[0], 2).square().sum())(pooled[0])
    assert torch.func.grad(loss)(pooled[0]).shape == z.shape
    torch._dynamo.reset()
    compiled = torch.compile(lambda p, i: max_unpool2d(p, i, 2), fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(pooled[0], indices[0]), each[0])
    assert torch.equal(compiled(pooled[0, :1, :2], indices[0, :1, :2]), each[0, :1, :2])
    torch.library.opcheck(torch.ops.fastnorm.max_unpool2d.default, (pooled[0].requires_grad_(), indices[0], [8, 8]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_has_torchs_dtypes(dtype):
    x, indices = torch.randn(1, 2, 2, 2).to(dtype), torch.arange(4).view(1, 1, 2, 2).expand(1, 2, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert max_unpool2d(x, indices, 2).dtype == F.max_unpool2d(x, indices, 2).dtype


def test_an_index_out_of_range(backend):
    x, indices = torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.int64)
    for bad in (64, -1):
        indices[0, 1, 2, 3] = bad
        if backend.name == "cpu":
            message = rf"max_unpool2d: Found an invalid max index: {bad} \(output volumes are of size 8x8"
            with pytest.raises(RuntimeError, match=message):
                max_unpool2d(x, indices, 2)
            with pytest.raises(RuntimeError, match="Found an invalid max index"):
                F.max_unpool2d(x, indices, 2)
        elif backend.name == "cuda_emulation":  # on a device it ends the process's use of it, as torch's own
            with pytest.raises(RuntimeError, match="trap"):
                max_unpool2d(x, indices, 2)


x, i = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    "kind, message, call",
    [
        (RuntimeError, "should be type int64", lambda f: f(x, i.int(), 2)),
        (RuntimeError, "shape of indices to be same", lambda f: f(x, i[:1], 2)),
        (RuntimeError, "3d or 4d Tensor", lambda f: f(x[0, 0], i[0, 0], 2)),
        (RuntimeError, "non-zero size for non-batch dimensions", lambda f: f(x[:, :0], i[:, :0], 2)),
        (ValueError, "invalid output_size", lambda f: f(x, i, 2, output_size=(3, 3))),
        (ValueError, "should be a sequence containing", lambda f: f(x, i, 2, output_size=(1, 2, 3))),
        (NotImplementedError, "not implemented for 'Int'", lambda f: f(x.int(), i, 2)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors_are_torchs(kind, message, call):
    for function in (max_unpool2d, F.max_unpool2d):
        with pytest.raises(kind, match=message):
            call(function)
    assert max_unpool2d(x[:0], i[:0], 2).shape == (0, 3, 8, 8)


def test_a_negative_size():
    with pytest.raises(ValueError, match="must contain non-negative"):  # as torch's; version 2.10 says something else
        max_unpool2d(x, i, -2)
