"""Random shapes, strides and arguments against torch."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import ACTIVATIONS, Arguments, check, evaluate, keep_off_kinks, oracle
from test_batch_norm import by_fastnorm, by_torch

SETTINGS = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def strided(draw, shape, dtype, generator):
    """A tensor of this shape in some order of strides, with gaps, an offset, or expanded."""
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.integers(1, 3))
    offset = draw(st.integers(0, 3))
    expanded = [d for d in range(len(shape)) if d != 1 and draw(st.integers(0, 9)) == 0 and len(shape) > 2]
    sizes = [1 if d in expanded else shape[d] for d in order]
    count = int(torch.tensor(sizes).prod()) * step + offset
    flat = torch.randn(count, generator=generator, dtype=torch.float64).mul(2).add(1).to(dtype)
    dense = flat[offset:].view(*sizes, step)[..., 0]
    inverse = [order.index(d) for d in range(len(shape))]
    return dense.permute(inverse).expand(shape)


@st.composite
def arguments(draw):
    dims = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 9)), draw(st.integers(1, 20)), *(draw(st.integers(1, 12)) for _ in range(dims - 2))]
    values = torch.Size(shape).numel() // shape[1]
    training = draw(st.booleans()) and values > 3
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    param_dtype = torch.float32 if dtype.itemsize == 2 and draw(st.booleans()) else dtype
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def channels(maybe=True):
        if maybe and draw(st.booleans()):
            return None
        t = torch.rand(shape[1] * 2, generator=generator).to(param_dtype) + 0.5
        return t[::2] if draw(st.booleans()) else t[: shape[1]]

    a = Arguments(x=draw(strided(shape, dtype, generator)), training=training)
    a.residual = draw(st.none() | strided(shape, dtype, generator))
    a.weight, a.bias = channels(), channels()
    if not training or draw(st.booleans()):
        a.running_mean, a.running_var = channels(maybe=False), channels(maybe=False)
    a.activation = draw(st.sampled_from(ACTIVATIONS))
    a.momentum = draw(st.floats(0, 1))
    a.eps = draw(st.sampled_from([1e-5, 1e-3, 0.1]))
    a.negative_slope = draw(st.floats(0, 1))
    a.dy = draw(strided(shape, dtype, generator))
    keep_off_kinks(a)
    return a


@SETTINGS
@given(arguments())
def test_against_torch(a):
    before = {n: t.clone() for n, t in a.tensors().items()}
    ours = evaluate(by_fastnorm, a)
    # Few values and many expanded ones make a channel's variance small, and with it the gradients' cancellation large.
    check(ours, evaluate(by_torch, a), oracle(a), slack=8)
    assert ours.y.shape == a.x.shape and ours.y.dtype == a.x.dtype
    assert all(torch.equal(t, before[n]) for n, t in a.tensors().items())
