"""Batch norm against torch and the oracle: every dtype, layout, activation, residual and mode; shapes by regime."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, LAYOUTS, to_layout
from oracle import ACTIVATIONS, Arguments, check, error, evaluate, keep_off_kinks, oracle
from torch.profiler import ProfilerActivity, profile

import fastnorm
from fastnorm.activation import activate
from fastnorm.functional import batch_norm

EVERY_ISA = True

# Each for what it reaches in the kernels.
SHAPES = {
    "odd": (3, 7, 5, 3),  # nothing is a multiple of a vector
    "one_channel": (6, 1, 4, 5),
    "narrow": (4, 3, 16, 16),
    "wide": (2, 65, 7, 7),
    "sequence": (5, 6, 33),
    "features": (33, 130),  # hw is 1: rows
    "volume": (2, 6, 3, 4, 5),
    "long_plane": (2, 2, 70, 70),  # a plane of several segments
    "few_values": (5, 3, 1, 1),
}
LARGE = {
    "many_rows": (8, 24, 40, 40),  # several chunks of rows
    "many_planes": (80, 40, 9, 9),  # several segments of planes
    "one_large_plane": (1, 3, 300, 300),
}


def make(
    shape, dtype=torch.float32, layout="planes", activation=None, residual=False, training=True, device="cpu",
    param_dtype=None, affine=True, mean=1.0, std=2.0, momentum=0.1,
):  # fmt: skip
    c, param_dtype = shape[1], param_dtype or dtype
    a = Arguments(x=to_layout((torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype), layout))
    if residual:
        a.residual = to_layout(torch.randn(shape, dtype=torch.float64).to(dtype), layout)
    if affine:
        a.weight, a.bias = (torch.rand(c).double() + 0.5).to(param_dtype), torch.randn(c).to(param_dtype)
    a.running_mean = (torch.randn(c).double() + mean).to(param_dtype)
    a.running_var = (torch.rand(c).double() * std**2 + 0.5).to(param_dtype)
    a.training, a.activation, a.momentum = training, activation, momentum
    a.dy = to_layout(torch.randn(shape, dtype=torch.float64).to(dtype), layout)
    keep_off_kinks(a)
    for name in (*a.tensors(), "dy"):
        setattr(a, name, getattr(a, name).to(device))
    return a


def by_fastnorm(a):
    return batch_norm(
        a.x, a.running_mean, a.running_var, a.weight, a.bias, a.training, a.momentum, a.eps, activation=a.activation,
        residual=a.residual, negative_slope=a.negative_slope,
    )  # fmt: skip


def by_torch(a):
    # its CUDA backward fails for a bias without a weight
    weight = torch.ones_like(a.bias) if a.weight is None and a.bias is not None else a.weight
    z = F.batch_norm(a.x, a.running_mean, a.running_var, weight, a.bias, a.training, a.momentum, a.eps)
    return activate(z if a.residual is None else z + a.residual, a.activation, a.negative_slope)


def check_case(a):
    before = {n: t.clone() for n, t in a.tensors().items()}
    ours = evaluate(by_fastnorm, a)
    check(ours, evaluate(by_torch, a), oracle(a))
    if not a.training:
        assert torch.equal(ours.running_mean, a.running_mean) and torch.equal(ours.running_var, a.running_var)
    for name, t in a.tensors().items():
        assert torch.equal(t, before[name]), f"{name} was modified"
    return ours


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation(backend, dtype, layout, residual, training):
    shapes = [(2, 5, 3, 3)] if backend.small else [(3, 7, 5, 3), (2, 64, 6, 6)]
    for shape, activation in itertools.product(shapes, ACTIVATIONS):
        check_case(make(shape, dtype, layout, activation, residual, training, backend.device))


@pytest.mark.parametrize("name", [*SHAPES, *LARGE])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(backend, dtype, layout, name):
    shape = SHAPES.get(name) or LARGE[name]
    if layout == "channels_last" and len(shape) < 4:
        return  # the same memory as planes
    if backend.small and (name in LARGE or (name == "long_plane" and dtype != torch.float32)):
        return
    few = backend.small or name in LARGE
    for training, (activation, residual) in itertools.product(
        (True, False), [("relu", True)] if few else [(None, False), ("relu", False), ("relu", True)]
    ):
        check_case(make(shape, dtype, layout, activation, residual, training, backend.device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_parameters_beside_16_bit_input(backend, dtype, layout):
    for training, activation in itertools.product((True, False), (None, "relu", "silu")):
        a = make((3, 6, 4, 5), dtype, layout, activation, True, training, backend.device, param_dtype=torch.float32)
        ours = check_case(a)
        assert ours.y.dtype == dtype and ours.gradients["weight"].dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", ["", "weight", "bias"])
def test_without_weight_or_bias(backend, layout, given):
    for training, activation in itertools.product((True, False), (None, "gelu")):
        a = make((3, 6, 4, 5), torch.float32, layout, activation, True, training, backend.device)
        a.weight, a.bias = (a.weight, None) if given == "weight" else (None, a.bias if given == "bias" else None)
        check_case(a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_negative_slope(backend, layout):
    for slope, residual in itertools.product((0.3, 0.0, 2.0), (False, True)):
        a = make((3, 6, 4, 5), torch.float32, layout, "leaky_relu", residual, True, backend.device)
        a.negative_slope = slope
        check_case(a)


@pytest.mark.parametrize("channels", [1, 3, 6, 7, 65])
def test_channel_counts(backend, channels):
    for layout, dtype in itertools.product(LAYOUTS, (torch.float32, torch.bfloat16)):
        check_case(make((3, channels, 3, 5), dtype, layout, "relu", True, True, backend.device))


def test_every_tail(backend):
    """Row and plane lengths around a vector's."""
    for length in (2, 9) if backend.small else range(2, 40):
        for dtype in (torch.float32, torch.bfloat16):
            check_case(make((2, 3, length), dtype, "planes", "relu", True, True, backend.device))
            check_case(make((3, length), dtype, "planes", "relu", True, True, backend.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layouts_of_the_input(backend, dtype):
    """Strided, expanded, permuted, misaligned, and channels_last with a residual that is not."""
    shape = (3, 6, 4, 5)
    views = {
        "step": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
        "permuted": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
        "expanded": lambda t: t[:1].expand_as(t),
        "channels_last": lambda t: to_layout(t, "channels_last"),
        "slice": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    }
    for (_, of_x), (_, of_others) in itertools.product(views.items(), list(views.items())[:4]):
        a = make(shape, dtype, "planes", "relu", True, True, backend.device)
        dense = evaluate(by_fastnorm, a)
        a.x, a.residual, a.dy = of_x(a.x), of_others(a.residual), of_others(a.dy)
        a.weight, a.running_mean = (torch.stack([t, t], 1)[:, 0] for t in (a.weight, a.running_mean))
        copy = Arguments(**a.__dict__)
        copy.x, copy.residual, copy.dy = (
            t.clone(memory_format=torch.contiguous_format) for t in (a.x, a.residual, a.dy)
        )
        ours, contiguous = by_fastnorm(a), by_fastnorm(copy)
        assert error(ours, contiguous) <= 8 * torch.finfo(dtype).eps
        assert ours.shape == dense.y.shape


def test_running_statistics_need_not_be_contiguous(backend):
    a = make((4, 6, 3, 3), device=backend.device)
    base = torch.stack([a.running_mean, a.running_var], 1)
    batch_norm(a.x, base[:, 0], base[:, 1], training=True)
    batch_norm(a.x, a.running_mean, a.running_var, training=True)
    assert torch.equal(base, torch.stack([a.running_mean, a.running_var], 1))


@pytest.mark.parametrize("dims", [4, 5])
def test_channels_last_is_kept(backend, dims):
    shape = (2, 6, 4, 5, 3)[:dims]
    format = torch.channels_last if dims == 4 else torch.channels_last_3d
    a = make(shape, layout="channels_last", activation="relu", residual=True, device=backend.device)
    ours = evaluate(by_fastnorm, a)
    for t in (ours.y, ours.gradients["x"], ours.gradients["residual"]):
        assert t.is_contiguous(memory_format=format) and not t.is_contiguous()


def test_one_residual_for_both(backend):
    """x as its own residual: both gradients add up."""
    a = make((3, 6, 4, 5), torch.float64, device=backend.device)
    for activation in (None, "relu", "silu"):
        x = a.x.clone().requires_grad_()
        ours = batch_norm(x, None, None, training=True, residual=x, activation=activation)
        theirs = activate(F.batch_norm(x, None, None, training=True) + x, activation, 0.01)
        dx, dx_torch = (torch.autograd.grad(y, x, a.dy)[0] for y in (ours, theirs))
        torch.testing.assert_close(dx, dx_torch)


def test_frozen_statistics_have_gradients(backend):
    check_case(
        make((4, 6, 5, 5), torch.float64, activation="silu", residual=True, training=False, device=backend.device)
    )


@pytest.mark.parametrize("subset", ["x", "weight", "bias", "residual", "x bias", "weight residual"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_only_the_gradients_that_are_asked_for(backend, subset, activation):
    for training, layout in itertools.product((True, False), LAYOUTS):
        a = make((3, 6, 4, 5), torch.float64, layout, activation, True, training, backend.device)
        everything = evaluate(by_fastnorm, a).gradients
        wanted = {n: getattr(a, n).clone().requires_grad_() for n in subset.split()}
        y = by_fastnorm(Arguments(**{**a.__dict__, **wanted}))
        gradients = torch.autograd.grad(y, list(wanted.values()), a.dy)
        for name, g in zip(wanted, gradients, strict=True):
            assert torch.equal(g, everything[name]), name


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4, 3, 0, 5), (0, 3), (0, 3, 5), (4, 0, 3, 3), (0, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_empty(backend, shape, training):
    """Statistics, counter and gradients as torch's; no channels with a weight, which torch refuses, are empty too."""
    results = []
    for cls in ((nn := torch.nn) and {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)], None):
        norm = (
            (cls or getattr(fastnorm, results[0][0]))(shape[1], affine=shape[1] > 0).to(backend.device).train(training)
        )
        x = torch.ones(shape, device=backend.device, requires_grad=True)
        y = norm(x)
        y.sum().backward()
        state = {n: t.tolist() for n, t in norm.state_dict().items()}
        results.append(
            (type(norm).__name__, y.shape, state, x.grad.shape, [p.grad.tolist() for p in norm.parameters()])
        )
    assert results[0] == results[1]


def test_no_channels_with_a_weight(backend):
    norm = fastnorm.BatchNorm2d(0).to(backend.device)
    norm(torch.ones(2, 0, 3, 3, device=backend.device)).sum().backward()
    assert norm.weight.grad.shape == (0,)


def run_and_count_saved_bytes(function, exclude):
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(size for pointer, size in saved.items() if pointer not in exclude)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_kept_for_backward(backend, layout):
    """Beside the input and the parameters: three numbers per channel, and with a residual one bit per element."""
    n, c, hw = 2, 16, 64
    a = make((n, c, 8, 8), layout=layout, residual=True, device=backend.device)
    x, w = a.x.requires_grad_(), a.weight.requires_grad_()
    exclude = {x.data_ptr(), w.data_ptr(), a.bias.data_ptr()}

    def count(**kwargs):
        return run_and_count_saved_bytes(lambda: batch_norm(x, None, None, w, a.bias, True, **kwargs), exclude)

    statistics = 3 * c * 4
    assert count() == statistics
    assert count(activation="relu") == statistics
    assert count(residual=a.residual) == statistics
    assert count(residual=a.residual, activation="relu") == statistics + n * c * hw // 8
    assert count(residual=a.residual, activation="silu") == statistics + n * c * hw * 4


def test_nothing_is_kept_without_gradients():
    a = make((2, 4, 3, 3))
    assert run_and_count_saved_bytes(lambda: batch_norm(a.x, None, None, a.weight, None, True), set()) == 0
    assert batch_norm(a.x, None, None, training=True).grad_fn is None


def test_two_backward_passes_need_retain_graph():
    a = make((2, 4, 3, 3))
    y = batch_norm(a.x.requires_grad_(), None, None, training=True, activation="relu")
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_a_changed_input_is_noticed_in_backward():
    a = make((2, 4, 3, 3))
    x = (a.x.requires_grad_() * 1).clone()
    y = batch_norm(x, None, None, training=True)
    x.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_versions_of_running_statistics(backend):
    a = make((2, 4, 3, 3), device=backend.device)
    versions = a.running_mean._version, a.running_var._version
    batch_norm(a.x, a.running_mean, a.running_var, training=False)
    assert (a.running_mean._version, a.running_var._version) == versions
    batch_norm(a.x, a.running_mean, a.running_var, training=True)
    assert a.running_mean._version > versions[0] and a.running_var._version > versions[1]


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_in_place(backend, dtype, layout, residual, activation):
    # 49 elements of a plane and 7 channels: the last vector of a run overlaps what has been written already.
    for shape in ((3, 7, 7, 7), (2, 65, 5, 4), (5, 6, 33), (33, 130), (2, 3, 1, 2)):
        a = make(shape, dtype, layout, activation, residual, False, backend.device)
        expected = by_fastnorm(a)
        memory, version = a.x.data_ptr(), a.x._version
        torch.ops.fastnorm.batch_norm_inference_(
            a.x, a.residual, a.weight, a.bias, a.running_mean, a.running_var, a.eps, activation or "none", 0.01
        )
        assert torch.equal(a.x, expected) and a.x.stride() == expected.stride()
        assert a.x.data_ptr() == memory and a.x._version > version


def test_inference_in_place_of_strided_memory(backend):
    a = make((4, 7, 5, 6), training=False, device=backend.device)
    expected, base = by_fastnorm(a), torch.zeros(4, 7, 6, 5, device=backend.device)
    x = base.transpose(2, 3).copy_(a.x)
    arguments = (a.weight, a.bias, a.running_mean, a.running_var, a.eps, "none", 0.01)
    torch.ops.fastnorm.batch_norm_inference_(x, None, *arguments)
    torch.testing.assert_close(base.transpose(2, 3), expected)
    with pytest.raises(RuntimeError, match="residual must have the input's shape"):
        torch.ops.fastnorm.batch_norm_inference_(x, a.x[:2], *arguments)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_of_a_slice_of_channels(backend, dtype, layout, residual, activation):
    """As of a dense copy, bit for bit; on the CPU without making one."""
    for shape in ((3, 7, 7, 7), (2, 65, 5, 4), (5, 6, 33), (33, 130), (2, 3, 1, 2), (1, 40, 3, 3), (4, 1, 6, 5),
                  (2, 64, 20, 20), (2, 3, 2, 4, 5)):  # fmt: skip
        a = make(shape, dtype, layout, activation, residual, False, backend.device)
        expected, dense = by_fastnorm(a), a.x
        n, c, *size = shape
        wide = torch.full((n, c + 9, *size), float("nan"), dtype=dtype, device=backend.device)
        wide = to_layout(wide, layout)
        for first in (0, 4):
            a.x = wide[:, first : first + c].copy_(dense)
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                y = by_fastnorm(a)
            strides = [[s for s, size in zip(t.stride(), shape, strict=True) if size > 1] for t in (y, expected)]
            assert torch.equal(y, expected) and strides[0] == strides[1]
            if backend.name == "cpu":
                assert not {"aten::clone", "aten::copy_"} & {e.key for e in recorded.key_averages()}
            kept = wide.clone()
            torch.ops.fastnorm.batch_norm_inference_(
                a.x, a.residual, a.weight, a.bias, a.running_mean, a.running_var, a.eps, activation or "none", 0.01
            )
            kept[:, first : first + c] = expected
            assert torch.equal(kept.nan_to_num(7), wide.nan_to_num(7))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place(backend, dtype, layout, residual, activation):
    """A gradient that is nobody else's becomes the gradient to x, with the same bits."""
    for shape in ((3, 7, 7, 7), (2, 65, 5, 4), (5, 6, 33), (33, 130), (2, 3, 1, 2), (2, 2, 70, 70), (8, 24, 40, 40)):
        a = make(shape, dtype, layout, activation, residual, device=backend.device)
        leaves = [t.requires_grad_() for t in (a.x, a.weight, a.bias, a.residual) if t is not None]
        kept = a.dy.clone()
        expected = torch.autograd.grad(by_fastnorm(a), leaves, a.dy)
        assert torch.equal(a.dy, kept)  # the caller's
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            y = by_fastnorm(a)
            found = torch.autograd.grad(y * 1.0, leaves, a.dy)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
        shared = residual and activation is None  # dy is the gradient to the residual
        if backend.name == "cpu" and a.dy.stride() == a.x.stride() == y.stride():
            in_place = "fastnorm::batch_norm_backward_" in {e.key for e in recorded.key_averages()}
            assert in_place != shared


def test_backward_in_place_leaves_alone_what_others_see(backend):
    a = make((4, 6, 5, 7), device=backend.device, activation="relu")
    a.x.requires_grad_()
    expected = torch.autograd.grad(by_fastnorm(a), a.x, a.dy)[0]
    seen = []

    def dx(y, *others):
        return torch.autograd.grad(y * 1.0, (a.x, *others), a.dy)

    for keep in (lambda dy: dy, lambda dy: dy.detach(), lambda dy: dy[1:], lambda dy: dy.numpy(force=True)):
        y = by_fastnorm(a)
        y.register_hook(lambda dy, keep=keep: seen.append((keep(dy), keep(dy.clone()))) and None)
        assert torch.equal(dx(y)[0], expected)
    for kept, before in seen:
        torch.testing.assert_close(kept, before, rtol=0, atol=0)
    assert len(seen) == 4
    y = by_fastnorm(a)  # asked for too
    assert torch.equal(dx(y, y)[1], a.dy)
    y = by_fastnorm(a)
    y.retain_grad()
    (y * 1.0).backward(a.dy)
    assert torch.equal(y.grad, a.dy)
    # One gradient for two norms, and for a norm and something else.
    twice = by_fastnorm(a) + by_fastnorm(a)
    torch.testing.assert_close(dx(twice)[0], 2 * expected)
    other = torch.zeros_like(a.x, requires_grad=True)
    found = dx(by_fastnorm(a) + other, other)
    assert torch.equal(found[0], expected) and torch.equal(found[1], a.dy)
    y = by_fastnorm(a)  # with a graph of its own
    first = torch.autograd.grad(y * 1.0, a.x, a.dy.clone().requires_grad_(), create_graph=True)[0]
    torch.testing.assert_close(first, expected)
    # Not dense, as a sum's, or not like x.
    of_sum = a.dy[:, :, 0, 0]
    expanded = torch.autograd.grad(by_fastnorm(a), a.x, of_sum[..., None, None].expand_as(a.x).contiguous())[0]
    torch.testing.assert_close(torch.autograd.grad(by_fastnorm(a).sum((2, 3)), a.x, of_sum)[0], expanded)
    transposed = torch.autograd.grad(by_fastnorm(a) * 1.0, a.x, a.dy.transpose(2, 3).contiguous().transpose(2, 3))[0]
    torch.testing.assert_close(transposed, expected)
    # Several at once.
    both = torch.autograd.grad(by_fastnorm(a) * 1.0, a.x, torch.stack([a.dy, 2 * a.dy]), is_grads_batched=True)[0]
    torch.testing.assert_close(both, torch.stack([expected, 2 * expected]))


def test_backward_in_place_of_strided_memory(backend):
    a = make((4, 7, 5, 6), device=backend.device)
    stats = torch.ops.fastnorm.batch_norm_forward(
        a.x, None, a.weight, a.bias, None, None, None, True, 0.1, a.eps, "none", 0.01, False
    )[1]
    rest = (a.x, None, a.weight, a.bias, stats, None, True, a.eps, "none", 0.01, [True, False, True, True])
    expected = torch.ops.fastnorm.batch_norm_backward(a.dy, *rest)
    dy = torch.zeros(4, 7, 6, 5, device=backend.device).transpose(2, 3).copy_(a.dy)
    version = dy._version
    found = torch.ops.fastnorm.batch_norm_backward_(dy, *rest)
    for f, e in zip((dy, *found), expected, strict=True):
        torch.testing.assert_close(f, e)
    assert dy._version > version
