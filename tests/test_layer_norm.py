"""Layer norm and RMS norm, the operators, against torch and the oracle: every dtype, layout, activation, residual,
addend and wanted gradient; shapes by regime."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES
from oracle import ACTIVATIONS, KINKS, Results, check
from oracle import activate as oracle_activate
from torch import Tensor

from fastnorm.activation import activate

EVERY_ISA = True

# (shape, first normalised dimension, how many), each for what it reaches in the kernels.
SHAPES = {
    "odd": ((3, 5, 7), -1, 1),  # less than a vector
    "pack_and_tail": ((9, 65), -1, 1),
    "one_row": ((1, 130), -1, 1),
    "several_dimensions": ((6, 3, 4, 5), -3, 3),
    "batches": ((131, 48), -1, 1),  # more rows than are worked on together
    "segments": ((3, 8200), -1, 1),  # a row of several segments
    "channels": ((2, 6, 5, 3), 1, 1),  # rows with a stride
    "channels_of_sequence": ((2, 9, 33), 1, 1),
    "channels_of_volume": ((2, 5, 3, 4, 5), 1, 1),
    "one_pixel": ((4, 37, 1, 1), 1, 1),  # inner is 1: rows
}
LARGE = {
    "many_rows": ((700, 96), -1, 1),  # several chunks, and more rows than are summed in float32
    "wide_rows": ((6, 33000), -1, 1),  # shared by the threads
    "many_blocks": ((300, 2, 300), -2, 2),
    "many_tiles": ((3, 70, 60, 47), 1, 1),
    "many_channels": ((2, 520, 9, 9), 1, 1),  # more than are summed in float32
}


@dataclass
class Case:
    x: Tensor
    dim: int
    count: int
    addend: Tensor | None = None
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    dy: Tensor | None = None
    dsum: Tensor | None = None
    rms: bool = False
    eps: float = 1e-5
    activation: str | None = None
    slope: float = 0.01

    @property
    def normalized_shape(self) -> list[int]:
        first = self.dim % self.x.dim()
        return list(self.x.shape[first : first + self.count])

    def map(self, f) -> "Case":
        names = ("x", "addend", "residual", "weight", "bias", "dy", "dsum")
        return replace(self, **{n: f(getattr(self, n)) for n in names if getattr(self, n) is not None})


def make(
    shape, dim=-1, count=1, dtype=torch.float32, activation=None, residual=False, addend=False, rms=False,
    parameters="both", param_dtype=None, mean=1.0, std=2.0, device="cpu",
):  # fmt: skip
    def random(*size):
        return torch.randn(*size, dtype=torch.float64)

    c = Case((random(*shape) * std + mean).to(dtype), dim, count, rms=rms, activation=activation)
    if addend:
        c.addend, c.dsum = random(*shape).to(dtype), random(*shape).to(dtype)
    if residual:
        c.residual = random(*shape).to(dtype)
    if parameters in ("both", "weight"):
        c.weight = (torch.rand(c.normalized_shape).double() + 0.5).to(param_dtype or dtype)
    if parameters in ("both", "bias"):
        c.bias = random(*c.normalized_shape).to(param_dtype or dtype)
    c.dy = random(*shape).to(dtype)
    z = exact_argument(c.map(Tensor.double))[0]
    margin = 50 * torch.finfo(dtype).eps
    for kink in KINKS.get(activation, ()):  # there, roundings decide on the slope
        c.dy = c.dy.masked_fill((z - kink).abs() < margin * (1 + abs(kink)), 0)
    return c.map(lambda t: t.to(device))


# ---- Three ways to the same results ---------------------------------------------------------------------------------


def forward(c, save_mask):
    return torch.ops.fastnorm.layer_norm_forward(
        c.x, c.addend, c.residual, c.weight, c.bias, c.normalized_shape, c.dim, c.rms, c.eps,
        c.activation or "none", c.slope, save_mask,
    )  # fmt: skip


def backward(c, h, stats, mask, wanted=(True, True, True, True)):
    wanted = [w and t is not None for w, t in zip(wanted, (c.x, c.residual, c.weight, c.bias), strict=True)]
    return torch.ops.fastnorm.layer_norm_backward(
        c.dy, h, c.residual if mask.numel() == 0 else None, c.weight, c.bias, stats, mask, c.dsum,
        c.normalized_shape, c.dim, c.rms, c.eps, c.activation or "none", c.slope, wanted,
    )  # fmt: skip


def by_fastnorm(c, save_mask=None):
    if save_mask is None:
        save_mask = c.residual is not None and c.activation in ("relu", "relu6", "leaky_relu")
    y, h, stats, mask = forward(c, save_mask)
    if c.addend is None:
        h = c.x
    else:
        assert torch.equal(h, c.x + c.addend)
    gradients = backward(c, h, stats, mask)
    names = {"x": c.x, "residual": c.residual, "weight": c.weight, "bias": c.bias}
    return Results(y, gradients={n: g for (n, t), g in zip(names.items(), gradients, strict=True) if t is not None})


def by_autograd(c, argument, function):
    c = c.map(lambda t: t.detach().clone())
    inputs = {n: t.requires_grad_() for n in ("x", "residual", "weight", "bias") if (t := getattr(c, n)) is not None}
    z, h = argument(c)
    y = function(z, c.activation, c.slope)
    outputs, gradients = ([y, h], [c.dy, c.dsum]) if c.dsum is not None else ([y], [c.dy])
    gradients = torch.autograd.grad(outputs, list(inputs.values()), gradients)
    return Results(y.detach(), gradients=dict(zip(inputs, gradients, strict=True)))


def by_torch(c):
    def argument(c):
        h = c.x if c.addend is None else c.x + c.addend
        last = h.movedim(1, -1) if c.dim == 1 else h
        for t in (c.weight, c.bias):
            if t is not None and t.dtype != h.dtype:  # which not every kernel of torch takes
                last = last.to(t.dtype)
        if c.rms:
            z = F.rms_norm(last, c.normalized_shape, c.weight, c.eps)
            z = z if c.bias is None else z + c.bias
        else:
            z = F.layer_norm(last, c.normalized_shape, c.weight, c.bias, c.eps)
        z = (z.movedim(-1, 1) if c.dim == 1 else z).to(h.dtype)
        return (z if c.residual is None else z + c.residual), h

    return by_autograd(c, argument, activate)


def exact_argument(c, rounded=None):
    h = c.x if c.addend is None else c.x + c.addend
    if rounded is not None:
        h = h + (rounded - h).detach()
    dims = list(range(c.x.dim()))[c.dim % c.x.dim() :][: c.count]
    shape = [n if d in dims else 1 for d, n in enumerate(c.x.shape)]
    count = math.prod(c.normalized_shape)
    centered = h if c.rms else h - h.sum(dims, keepdim=True) / count
    z = centered / torch.sqrt((centered**2).sum(dims, keepdim=True) / count + c.eps)
    z = z if c.weight is None else z * c.weight.view(shape)
    z = z if c.bias is None else z + c.bias.view(shape)
    return (z if c.residual is None else z + c.residual), h


def exact(c):
    rounded = None if c.addend is None else (c.x + c.addend).cpu().double()
    return by_autograd(c.map(lambda t: t.cpu().double()), lambda d: exact_argument(d, rounded), oracle_activate)


def check_case(c):
    before = c.map(Tensor.clone)
    ours = by_fastnorm(c)
    check(ours, by_torch(c), exact(c))
    for name in ("x", "addend", "residual", "weight", "bias", "dy", "dsum"):
        t = getattr(c, name)
        assert t is None or torch.equal(t, getattr(before, name)), f"{name} was modified"
    return ours


def tensors(results):
    return list(results.tensors().values())


def assert_same(a, b):
    for name, (s, t) in zip(a.tensors(), zip(tensors(a), tensors(b), strict=True), strict=True):
        assert torch.equal(s, t), name


RMS = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
ROWS_AND_TILES = pytest.mark.parametrize("where", [((5, 7), -1), ((2, 6, 3, 5), 1)], ids=["rows", "tiles"])

# ---- Results --------------------------------------------------------------------------------------------------------


@RMS
@ROWS_AND_TILES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation(backend, dtype, where, rms):
    (shape, dim), options = where, [(False, False), (True, False), (True, True)]
    for activation, (residual, addend) in itertools.product(ACTIVATIONS, options):
        check_case(make(shape, dim, 1, dtype, activation, residual, addend, rms, device=backend.device))


@pytest.mark.parametrize("name", [*SHAPES, *LARGE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(backend, dtype, name):
    if backend.small and (name in LARGE or (name == "segments" and dtype != torch.float32)):
        return
    shape, dim, count = SHAPES.get(name) or LARGE[name]
    cases = [(None, False, False, False), ("relu", True, False, False), ("silu", True, True, False)]
    cases += [(None, False, False, True), ("leaky_relu", True, True, True)]
    for activation, residual, addend, rms in cases[1::3] if backend.small else cases:
        check_case(make(shape, dim, count, dtype, activation, residual, addend, rms, device=backend.device))


@ROWS_AND_TILES
@pytest.mark.parametrize("parameters", ["", "weight", "bias"])
def test_without_weight_or_bias(backend, parameters, where):
    for rms, activation in itertools.product((False, True), (None, "relu", "gelu")):
        c = make(where[0], where[1], activation=activation, residual=True, rms=rms, parameters=parameters)
        check_case(c.map(lambda t: t.to(backend.device)))


@ROWS_AND_TILES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_parameters_beside_16_bit_input(backend, dtype, where):
    options = {"residual": True, "param_dtype": torch.float32, "device": backend.device}
    for activation, parameters in itertools.product((None, "relu", "silu"), ("both", "bias")):
        c = make(where[0], where[1], 1, dtype, activation, parameters=parameters, **options)
        ours = check_case(c)
        assert ours.y.dtype == dtype and ours.gradients["bias"].dtype == torch.float32
        assert ours.gradients["x"].dtype == dtype


@ROWS_AND_TILES
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_every_subset_of_gradients(backend, where, activation):
    c = make(where[0], where[1], activation=activation, residual=True, addend=True, device=backend.device)
    _, h, stats, mask = forward(c, activation == "relu")
    everything = backward(c, h, stats, mask)
    for wanted in itertools.product((False, True), repeat=4):
        for name, some, all_, w in zip(("x", "residual", "weight", "bias"), backward(c, h, stats, mask, wanted),
                                       everything, wanted, strict=True):  # fmt: skip
            assert torch.equal(some, all_) if w else some.numel() == 0, name


@pytest.mark.parametrize("name", ["odd", "pack_and_tail", "channels", "channels_of_sequence"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_says_what_the_residual_says(backend, dtype, name):
    """Forward's mask and backward's recomputation agree bit for bit."""
    shape, dim, count = SHAPES[name]
    for activation, rms in itertools.product(("relu", "relu6", "leaky_relu"), (False, True)):
        c = make(shape, dim, count, dtype, activation, True, rms=rms, mean=1e3, device=backend.device)
        c.dy = torch.randn_like(c.dy)  # kinks included
        assert_same(by_fastnorm(c, save_mask=True), by_fastnorm(c, save_mask=False))


# ---- Memory ---------------------------------------------------------------------------------------------------------


def spread(t):
    """The same values, not contiguous."""
    return torch.stack([t, t], -1)[..., 0]


def unaligned(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("change", [spread, unaligned], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["pack_and_tail", "channels"])
def test_any_strides_and_alignment(backend, name, change):
    c = make(*SHAPES[name], activation="relu", residual=True, addend=True, device=backend.device)
    assert_same(by_fastnorm(c.map(change)), by_fastnorm(c))


def test_expanded_input(backend):
    c = make((4, 33), device=backend.device)
    c.x = c.x[:1].expand(4, 33)
    check_case(c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_is_kept(backend, dtype):
    c = make((2, 7, 5, 3), 1, 1, dtype, "relu", True, True, device=backend.device)
    last = c.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    ours = by_fastnorm(last)
    for t in (ours.y, ours.gradients["x"], ours.gradients["residual"]):
        assert t.is_contiguous(memory_format=torch.channels_last)
    check(ours, by_torch(c), exact(c))


@pytest.mark.parametrize("shape, dim, count", [((0, 5), -1, 1), ((3, 0), -1, 1), ((2, 0, 4, 4), 1, 1),
                                               ((2, 3, 0), 1, 1), ((0, 2, 3), -2, 2)])  # fmt: skip
def test_nothing(backend, shape, dim, count):
    c = make(shape, dim, count, device=backend.device)
    ours = by_fastnorm(c)
    assert ours.y.shape == shape and ours.gradients["x"].shape == shape
    assert torch.equal(ours.gradients["weight"], torch.zeros_like(c.weight))
    assert torch.equal(ours.gradients["bias"], torch.zeros_like(c.bias))


def test_more_rows_than_a_grid_holds():
    check_case(make((70000, 2, 2), -2, 2, activation="relu", residual=True))
    check_case(make((70000, 3), -1, 1, rms=True))


# ---- Reproducibility ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batches", "segments", *LARGE])
def test_threads_do_not_matter(threads, name):
    for activation, addend, rms in ((None, False, False), ("gelu", True, True)):
        c = make(*(SHAPES.get(name) or LARGE[name]), torch.float32, activation, True, addend, rms)
        results = []
        for n in (1, 2, 5, 1):
            threads(n)
            results.append(by_fastnorm(c))
        for other in results[1:]:
            assert_same(results[0], other)


@pytest.mark.parametrize("name", ["pack_and_tail", "batches", "segments", "channels", "many_tiles", "wide_rows"])
def test_a_sample_is_the_same_in_any_batch(backend, name, threads):
    if backend.small and name in LARGE:
        return
    shape, dim, count = SHAPES.get(name) or LARGE[name]
    c = make(shape, dim, count, activation="silu", residual=True, addend=True, device=backend.device)
    whole = by_fastnorm(c)
    for begin, end in ((0, 1), (1, 2), (0, 2), (shape[0] - 1, shape[0])):
        part = replace(c, **{n: getattr(c, n)[begin:end] for n in ("x", "addend", "residual", "dy", "dsum")})
        threads(end)
        ours = by_fastnorm(part)
        for mine, all_ in ((ours.y, whole.y), *((ours.gradients[n], whole.gradients[n]) for n in ("x", "residual"))):
            assert torch.equal(mine, all_[begin:end])
