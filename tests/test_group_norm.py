"""Group norm against torch and the oracle: every dtype, layout, activation, residual; shapes and groups by regime."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, LAYOUTS, to_layout
from oracle import ACTIVATIONS, KINKS, Results, activate, check
from torch import Tensor

from fastnorm.functional import group_norm, instance_norm

EVERY_ISA = True

# (shape, groups), each for what it reaches in the kernels.
SHAPES = {
    "odd": ((3, 6, 5, 3), 2),  # nothing is a multiple of a vector; planes shorter than one
    "one_group": ((3, 7, 5, 3), 1),
    "one_channel_a_group": ((3, 7, 5, 3), 7),
    "three_channels_a_group": ((2, 15, 7, 7), 5),  # a plane is a vector and a part of one
    "wide": ((2, 65, 3, 3), 13),  # rows of more than a vector, not a multiple of it
    "sequence": ((5, 6, 33), 3),
    "features": ((33, 30), 5),  # hw is 1
    "pixels": ((70, 8, 1, 2), 4),  # several samples to a block of parameter gradients
    "volume": ((2, 6, 3, 4, 5), 3),
    "long_plane": ((1, 2, 70, 70), 2),  # a plane of several segments
}
LARGE = {
    "large_group": ((1, 4, 300, 300), 2),  # shared by the threads; a plane of several pieces; leaves the L2 cache
    "many_rows": ((2, 24, 60, 60), 8),  # channels_last: several chunks of rows, the last one shorter
    "many_samples": ((150, 6, 9, 9), 3),
}


@dataclass
class Case:
    x: Tensor
    groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str | None = None
    negative_slope: float = 0.01
    eps: float = 1e-5
    dy: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {n: t for n in ("x", "residual", "weight", "bias") if (t := getattr(self, n)) is not None}


def normalized(a: Case) -> Tensor:
    """What the activation is applied to, in the arguments' dtype."""
    x = a.x.reshape(a.x.shape[0], a.groups, -1)
    centered = x - x.mean(-1, keepdim=True)
    z = (centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + a.eps)).reshape(a.x.shape)
    shape = (1, -1) + (1,) * (a.x.dim() - 2)
    z = z if a.weight is None else z * a.weight.view(shape)
    z = z if a.bias is None else z + a.bias.view(shape)
    return z if a.residual is None else z + a.residual


def in_float64(a: Case) -> Case:
    return replace(a, dy=a.dy.cpu().double(), **{n: t.detach().cpu().double() for n, t in a.tensors().items()})


def by_formula(a: Case) -> Tensor:
    return activate(normalized(a), a.activation, a.negative_slope)


def by_torch(a: Case) -> Tensor:
    weight = torch.ones_like(a.bias) if a.weight is None and a.bias is not None else a.weight  # torch's backward fails
    z = F.group_norm(a.x, a.groups, weight, a.bias, a.eps)
    return activate(z if a.residual is None else z + a.residual, a.activation, a.negative_slope)


def by_fastnorm(a: Case) -> Tensor:
    return group_norm(
        a.x, a.groups, a.weight, a.bias, a.eps, activation=a.activation, residual=a.residual,
        negative_slope=a.negative_slope,
    )  # fmt: skip


def run(function, a: Case) -> Results:
    copies = {n: t.detach().clone().requires_grad_() for n, t in a.tensors().items()}
    y = function(replace(a, **copies))
    gradients = torch.autograd.grad(y, list(copies.values()), a.dy)
    return Results(y.detach(), gradients=dict(zip(copies, gradients, strict=True)))


def make(
    shape, groups, dtype=torch.float32, layout="planes", activation=None, residual=False, device="cpu",
    param_dtype=None, affine=True, mean=1.0, std=2.0,
) -> Case:  # fmt: skip
    def tensor(t):
        return to_layout(t.to(dtype), layout).to(device)

    c, param_dtype = shape[1], param_dtype or dtype
    a = Case(tensor(torch.randn(shape, dtype=torch.float64) * std + mean), groups, activation=activation)
    if affine:
        a.weight = (torch.rand(c).double() + 0.5).to(device, param_dtype)
        a.bias = torch.randn(c).to(device, param_dtype)
    a.residual = tensor(torch.randn(shape, dtype=torch.float64)) if residual else None
    a.dy = tensor(torch.randn(shape, dtype=torch.float64))
    # No gradient where the activation's argument is so near a kink that roundings decide on the slope.
    if kinks := KINKS.get(activation, ()):
        z, margin = normalized(in_float64(a)), 50 * torch.finfo(dtype).eps
        near = torch.stack([(z - k).abs() < margin * (1 + abs(k)) for k in kinks]).any(0)
        a.dy = tensor(a.dy.cpu().masked_fill(near, 0))
    return a


def check_case(a: Case) -> Results:
    before = {n: t.clone() for n, t in a.tensors().items()}
    ours = run(by_fastnorm, a)
    check(ours, run(by_torch, a), run(by_formula, in_float64(a)))
    for name, t in a.tensors().items():
        assert torch.equal(t, before[name]), f"{name} was modified"
    return ours


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation(backend, dtype, layout, residual):
    for shape, activation in itertools.product([(2, 6, 3, 3)] if backend.small else [(2, 6, 7, 7)], ACTIVATIONS):
        check_case(make(shape, 2, dtype, layout, activation, residual, backend.device))


@pytest.mark.parametrize("name", [*SHAPES, *LARGE])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(backend, dtype, layout, name):
    shape, groups = SHAPES.get(name) or LARGE[name]
    if layout == "channels_last" and len(shape) < 4:
        return  # has no such layout
    if backend.small and (name in LARGE or (name == "long_plane" and dtype != torch.float32)):
        return
    few = backend.small or name in LARGE
    for activation, residual in [("relu", True)] if few else [(None, False), ("silu", False), ("relu", True)]:
        check_case(make(shape, groups, dtype, layout, activation, residual, backend.device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 6, 12, 35])
def test_every_number_of_groups(backend, channels, layout):
    for groups in (g for g in range(1, channels + 1) if channels % g == 0):
        check_case(make((2, channels, 3, 5), groups, torch.float32, layout, "relu", True, backend.device))


def test_every_tail(backend):
    """Plane, group and row lengths around a vector's."""
    for length in (2, 9, 33) if backend.small else range(2, 40):
        for dtype in (torch.float32, torch.bfloat16):
            check_case(make((2, 4, length), 2, dtype, "planes", "relu", True, backend.device))
            check_case(make((2, 2 * length), 2, dtype, "planes", None, False, backend.device))
            check_case(make((2, length, 2, 2), 1, dtype, "channels_last", "relu", True, backend.device))


def test_groups_of_one_element(backend):
    """The bias, and no gradient but for the residual and the bias."""
    for layout, shape in itertools.product(LAYOUTS, [(3, 6), (3, 6, 1, 1)]):
        ours = run(by_fastnorm, a := make(shape, 6, torch.float64, layout, None, True, backend.device))
        torch.testing.assert_close(ours.y, a.bias.view(1, 6, *shape[2:]) + a.residual)
        zero = {n: torch.zeros_like(ours.gradients[n]) for n in ("x", "weight")}
        torch.testing.assert_close({n: ours.gradients[n] for n in zero}, zero)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_parameters_beside_16_bit_input(backend, dtype, layout):
    for activation in (None, "relu", "silu"):
        a = make((3, 6, 4, 5), 3, dtype, layout, activation, True, backend.device, param_dtype=torch.float32)
        ours = run(by_fastnorm, a)
        assert ours.y.dtype == dtype and ours.gradients["weight"].dtype == torch.float32
        rounded = replace(a, weight=a.weight.float(), bias=a.bias.float())  # torch: all in float32, then rounded
        theirs = run(lambda b: by_torch(replace(b, x=b.x.float(), residual=b.residual.float())).to(dtype), rounded)
        check(ours, theirs, run(by_formula, in_float64(a)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", ["", "weight", "bias"])
def test_without_weight_or_bias(backend, layout, given):
    for activation, shape in itertools.product((None, "gelu"), [(3, 6, 4, 5), (3, 6, 7, 5)]):
        a = make(shape, 2, torch.float32, layout, activation, True, backend.device)
        a.weight, a.bias = (a.weight, None) if given == "weight" else (None, a.bias if given == "bias" else None)
        check_case(a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_negative_slope(backend, layout):
    for slope, residual in itertools.product((0.3, 0.0, 2.0), (False, True)):
        a = make((3, 6, 4, 5), 2, torch.float32, layout, "leaky_relu", residual, backend.device)
        check_case(replace(a, negative_slope=slope))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eps(backend, layout):
    for eps in (1e-12, 0.1, 10.0):
        check_case(replace(make((3, 6, 4, 5), 2, layout=layout, device=backend.device, std=0.3), eps=eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layouts_of_the_input(backend, dtype):
    """Strided, permuted, misaligned, expanded, sliced, and channels_last beside a residual that is not: as copies of
    them give."""
    views = {
        "step": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
        "permuted": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
        "expanded": lambda t: t[:1].expand_as(t),
        "slice": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        "channels_last": lambda t: to_layout(t, "channels_last"),
    }
    a = make((3, 6, 4, 5), 2, dtype, "planes", "relu", True, backend.device)
    for of_x, of_others in itertools.product(views.values(), list(views.values())[:4]):
        b = replace(a, x=of_x(a.x), residual=of_others(a.residual), dy=of_others(a.dy))
        b.weight = torch.stack([a.weight, a.weight], 1)[:, 0]
        layout = "channels_last" if b.x.is_contiguous(memory_format=torch.channels_last) else "planes"
        c = replace(
            b, x=to_layout(b.x, layout).clone(), residual=to_layout(b.residual, layout).clone(), weight=a.weight
        )
        y, z = by_fastnorm(b), by_fastnorm(c)
        assert torch.equal(y, z) or torch.allclose(y, z, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dims", [4, 5])
def test_channels_last_is_kept(backend, dims):
    format = torch.channels_last if dims == 4 else torch.channels_last_3d
    a = make((2, 6, 4, 5, 3)[:dims], 3, layout="channels_last", activation="relu", residual=True, device=backend.device)
    ours = run(by_fastnorm, a)
    for t in (ours.y, ours.gradients["x"], ours.gradients["residual"]):
        assert t.is_contiguous(memory_format=format) and not t.is_contiguous()


def test_instance_norm_is_group_norm_with_a_group_per_channel(backend):
    for layout, activation in itertools.product(LAYOUTS, (None, "silu")):
        a = make((3, 6, 4, 5), 6, torch.float32, layout, activation, True, backend.device)
        y = instance_norm(a.x, weight=a.weight, bias=a.bias, activation=activation, residual=a.residual)
        assert torch.equal(y, by_fastnorm(a))
        z = activate(F.instance_norm(a.x, None, None, a.weight, a.bias) + a.residual, activation)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("subset", ["x", "weight", "bias", "residual", "x bias", "weight residual"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_only_the_gradients_that_are_asked_for(backend, subset, activation):
    for layout, shape in itertools.product(LAYOUTS, [(3, 6, 4, 5), (3, 6, 8, 6)]):
        a = make(shape, 2, torch.float64, layout, activation, True, backend.device)
        everything = run(by_fastnorm, a).gradients
        wanted = {n: getattr(a, n).clone().requires_grad_() for n in subset.split()}
        gradients = torch.autograd.grad(by_fastnorm(replace(a, **wanted)), list(wanted.values()), a.dy)
        for name, g in zip(wanted, gradients, strict=True):
            assert torch.equal(g, everything[name]), name


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (4, 6, 0, 5), (0, 6)])
def test_empty(backend, shape):
    """Zero samples or pixels: gradients of the parameters are zero."""
    x, w = torch.ones(shape, device=backend.device, requires_grad=True), torch.ones(6, device=backend.device)
    y = group_norm(x, 3, w.requires_grad_())
    y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape and w.grad.tolist() == [0] * 6


def saved_bytes(function, exclude):
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(size for pointer, size in saved.items() if pointer not in exclude)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_kept_for_backward(backend, layout):
    """Beside the input and the parameters: four numbers per group, and with a residual one bit per element."""
    n, c, hw, groups = 2, 16, 64, 4
    a = make((n, c, 8, 8), groups, layout=layout, residual=True, device=backend.device)
    x, w = a.x.requires_grad_(), a.weight.requires_grad_()
    exclude = {x.data_ptr(), w.data_ptr(), a.bias.data_ptr()}

    def count(**arguments):
        return saved_bytes(lambda: group_norm(x, groups, w, a.bias, **arguments), exclude)

    statistics = 4 * n * groups * 4
    assert count() == count(activation="relu") == count(residual=a.residual) == statistics
    assert count(residual=a.residual, activation="relu") == statistics + n * c * hw // 8
    assert count(residual=a.residual, activation="silu") == statistics + n * c * hw * 4
