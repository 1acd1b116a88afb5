"""SyncBatchNorm in real processes on gloo, against one process with the whole batch."""

import copy
import itertools
import os
import socket
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastnorm
from fastnorm import BatchNorm2d, SyncBatchNorm

CHANNELS = 5


def _process(rank: int, world: int, port: int, body) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        body(rank, world)
    finally:
        dist.destroy_process_group()


def run(world: int, body) -> None:
    """body(rank, world) in as many processes; a failure in one fails the test."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_process, (world, port, body), nprocs=world, start_method="spawn")


def shards(batch: int, world: int, kind: str) -> list[slice]:
    if kind == "even":
        cuts = [batch * r // world for r in range(world + 1)]
    elif kind == "uneven":
        cuts = [0, 1, *[batch * r // world + 1 for r in range(2, world)], batch]
    else:  # the last process has nothing
        cuts = [*[batch * r // (world - 1) for r in range(world)], batch]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def close(ours, exact, tolerance, name):
    error = (ours.double() - exact.double()).abs().max().item() if ours.numel() else 0.0
    allowed = tolerance * max(1.0, exact.double().abs().max().item() if exact.numel() else 0.0)
    assert error <= allowed, f"{name}: {error:.2e} off, allowed {allowed:.2e}"


def same_as_one_process(rank, world, *, kind, layout, activation, residual, dtype, mean, momentum, affine):
    generator = torch.Generator().manual_seed(0)
    shape = (7, CHANNELS, 4, 3)

    def data(offset=0.0):
        t = (torch.randn(shape, generator=generator, dtype=torch.float64) + offset).to(dtype)
        return t.contiguous(memory_format=layout)

    x, added, dy = data(mean), data() if residual else None, data()
    param_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    whole = nn.BatchNorm2d(CHANNELS, momentum=momentum, affine=affine, dtype=torch.float64)
    ours = SyncBatchNorm(CHANNELS, momentum=momentum, affine=affine, activation=activation, dtype=param_dtype)
    if affine:
        with torch.no_grad():
            whole.weight.copy_(torch.rand(CHANNELS, generator=generator).to(param_dtype) + 0.5)
            whole.bias.copy_(torch.randn(CHANNELS, generator=generator).to(param_dtype))
    ours.load_state_dict(whole.state_dict())

    def leaf(t):
        return None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    inputs = [leaf(x.double()), leaf(added.double() if residual else None)]
    mine = shards(len(x), world, kind)[rank]
    parts = [leaf(x[mine]), leaf(added[mine] if residual else None)]
    for _ in range(2):  # twice, for the running statistics
        z = whole(inputs[0])
        z = z if inputs[1] is None else z + inputs[1]
        y = fastnorm.activation.activate(z, activation, 0.01)
        part = ours(*parts)
    y.backward(dy.double())
    part.backward(dy[mine])

    eps = torch.finfo(dtype).eps
    tolerance = 64 * eps if dtype == torch.float64 else 8 * eps if dtype != torch.float32 else 2e-5
    assert part.dtype == dtype and part.shape == y[mine].shape
    assert part.numel() == 0 or part.is_contiguous(memory_format=layout)
    close(part, y[mine], tolerance, "y")
    close(parts[0].grad, inputs[0].grad[mine], 10 * tolerance, "dx")
    if residual:
        close(parts[1].grad, inputs[1].grad[mine], tolerance, "dresidual")
    statistics = 1e-12 if param_dtype == torch.float64 else 1e-6
    close(ours.running_mean, whole.running_mean, statistics, "running_mean")
    close(ours.running_var, whole.running_var, 2 * statistics, "running_var")
    assert ours.num_batches_tracked == 2
    for name, parameter in ours.named_parameters():  # everyone's sum to the whole batch's
        total = parameter.grad.double()
        dist.all_reduce(total)
        close(total, getattr(whole, name).grad, 20 * tolerance, f"d{name}")
    everyones = [torch.empty_like(ours.running_mean) for _ in range(world)]
    dist.all_gather(everyones, ours.running_mean)
    assert all(torch.equal(e, everyones[0]) for e in everyones)


def all_cases(rank, world):
    plain = dict(
        kind="even", layout=torch.contiguous_format, activation=None, residual=False, dtype=torch.float32, mean=1.0,
        momentum=0.1, affine=True,
    )  # fmt: skip
    changes = [
        {},
        {"layout": torch.channels_last},
        {"kind": "uneven", "activation": "relu"},
        {"kind": "uneven", "activation": "relu", "residual": True, "layout": torch.channels_last},
        {"kind": "empty", "activation": "silu", "residual": True},
        {"kind": "empty", "layout": torch.channels_last},
        {"activation": "leaky_relu", "residual": True},
        {"mean": -1e5},
        {"mean": 1e4, "layout": torch.channels_last, "kind": "uneven"},
        {"dtype": torch.float64, "activation": "gelu", "residual": True},
        {"dtype": torch.bfloat16, "activation": "silu"},
        {"dtype": torch.float16, "residual": True},
        {"momentum": None},
        {"affine": False, "activation": "relu", "residual": True},
    ]
    for change in changes:
        try:
            same_as_one_process(rank, world, **(plain | change))
        except AssertionError as error:
            raise AssertionError(f"{change}: {error}") from error


@pytest.mark.parametrize("world", [2, 3])
def test_same_as_one_process_with_the_whole_batch(world):
    run(world, all_cases)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.fused = BatchNorm2d(8, activation="relu")
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.last(self.fused(self.second(x), x).mean((2, 3)))


def train(model, batches, optimizer):
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def under_ddp(rank, world):
    torch.manual_seed(0)
    net = Net().double()
    batches = [(torch.randn(4 * world, 3, 5, 5).double(), torch.randint(4, (4 * world,))) for _ in range(3)]
    one = copy.deepcopy(net)
    train(one, batches, torch.optim.SGD(one.parameters(), 0.1, momentum=0.9))
    mine = SyncBatchNorm.convert_sync_batchnorm(net)
    assert isinstance(mine.norm, SyncBatchNorm) and mine.fused.activation == "relu"
    parallel = DistributedDataParallel(mine)
    part = slice(4 * rank, 4 * rank + 4)
    train(parallel, [(x[part], y[part]) for x, y in batches], torch.optim.SGD(parallel.parameters(), 0.1, momentum=0.9))
    for (name, a), b in zip(one.state_dict().items(), mine.state_dict().values(), strict=True):
        close(b, a, 1e-10, name)
    with pytest.raises(ValueError, match="GPU"):  # torch's own cannot run there
        DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), SyncBatchNorm(4), nn.SyncBatchNorm(4)))


@pytest.mark.parametrize("world", [2, 3])
def test_under_ddp_training_is_that_of_one_process(world):
    run(world, under_ddp)


def in_a_group(rank, world):
    """Processes 0 and 1 normalise together; 2 is alone in its group."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    torch.manual_seed(0)
    x = torch.randn(6, CHANNELS, 3, 3)
    norm = SyncBatchNorm(CHANNELS, process_group=groups[rank // 2])
    y = norm(x[2 * rank : 2 * rank + 2])
    together = slice(0, 4) if rank < 2 else slice(4, 6)
    exact = nn.functional.batch_norm(x[together].double(), None, None, training=True)
    close(y, exact[2 * (rank % 2) : 2 * (rank % 2) + 2], 1e-5, "y")
    assert torch.equal(norm.eval()(x), fastnorm.BatchNorm2d.forward(norm, x))  # in evaluation no process waits


def test_process_groups():
    run(3, in_a_group)


def checkpointed(rank, world):
    norm = SyncBatchNorm(CHANNELS)
    x = torch.randn(2, CHANNELS, 3, 3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False).sum().backward()
    assert norm.num_batches_tracked == 1
    with pytest.raises(ValueError, match="non-zero"):
        SyncBatchNorm(0)(torch.randn(2, 0, 3))


def test_running_statistics_are_updated_once_under_checkpointing():
    run(2, checkpointed)


def test_without_processes_it_is_batch_norm():
    torch.manual_seed(0)
    x, added = torch.randn(4, CHANNELS, 3, 3), torch.randn(4, CHANNELS, 3, 3)
    sync, plain = SyncBatchNorm(CHANNELS, activation="relu"), BatchNorm2d(CHANNELS, activation="relu")
    assert torch.equal(sync(x, added), plain(x, added)) and torch.equal(sync.running_var, plain.running_var)
    assert isinstance(sync, nn.SyncBatchNorm) and repr(sync).endswith("activation='relu')")


def test_convert_keeps_what_there_is():
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), BatchNorm2d(4, momentum=None, activation="silu").eval())
    converted = SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model and all(type(m) is SyncBatchNorm for m in model)
    assert model[0].weight is None and model[1].activation == "silu" and not model[1].training
    norm = nn.BatchNorm2d(4)
    alone = SyncBatchNorm.convert_sync_batchnorm(norm)
    assert alone.weight is norm.weight and alone.running_mean is norm.running_mean


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 4, 5), (2, 65, 3, 3), (1, 2, 70, 70), (9, 6)], ids=str)
def test_the_operators(backend, shape, dtype, layout):
    """The local statistics, and dx from given means, on every backend."""
    if backend.small and shape == (1, 2, 70, 70) and dtype != torch.float32:
        shape = (1, 2, 30, 30)
    layout = layout if len(shape) == 4 else torch.contiguous_format
    x, dz = (torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    x, dz = x.to(backend.device), dz.to(backend.device)
    c, dims = shape[1], [d for d in range(len(shape)) if d != 1]
    moments = torch.ops.fastnorm.batch_norm_statistics(x).cpu()
    var, mean = torch.var_mean(x.cpu().double(), dims)
    assert torch.allclose(moments, torch.stack((mean, var)), rtol=1e-6, atol=1e-6)
    weight = torch.rand(c).to(dtype).to(backend.device)
    running = [t.to(backend.device) for t in (mean, var)]
    _, stats, _ = torch.ops.fastnorm.batch_norm_forward.frozen(
        x, None, weight, None, *running, None, False, 0.0, 1e-5, "none", 0.01, False
    )
    means = torch.randn(2, c, dtype=torch.float64)
    dx = torch.ops.fastnorm.batch_norm_backward_elementwise(dz, x, weight, stats, means.to(backend.device)).cpu()
    view = partial(torch.Tensor.view, size=(1, -1, *[1] * (len(shape) - 2)))
    rstd = view((var + 1e-5).rsqrt())
    normalized = (x.cpu().double() - view(mean)) * rstd
    exact = (dz.cpu().double() - view(means[0]) - normalized * view(means[1])) * rstd * view(weight.cpu().double())
    assert dx.dtype == dtype and dx.stride() == x.stride()
    close(dx, exact, 2e-2 if dtype == torch.bfloat16 else 1e-5, "dx")
    torch.library.opcheck(torch.ops.fastnorm.batch_norm_statistics.default, (x,))


def test_the_operator_refuses_wrong_means():
    x, stats = torch.randn(3, 4, 5), torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="means must be contiguous float64"):
        torch.ops.fastnorm.batch_norm_backward_elementwise(x, x, None, stats, torch.zeros(2, 4))
