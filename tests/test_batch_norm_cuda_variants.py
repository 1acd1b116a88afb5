"""Which of batch norm's CUDA kernels runs for which size, and that each of them gives what the oracle does.

The choice is made on the host from sizes and a few properties of the device, so a small program that has the launch
code compiled in tells it for any device; the emulator runs the kernels.
"""

import functools
import json
import subprocess

import pytest
import torch
from cuda_emulator import SCHEDULES, build, configure, library, unavailable_reason

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#ifdef FORWARD
#include "batch_norm_forward.cu"
using Args = fastnorm::BatchNormForward;
template <class T> using Plan = fastnorm::ForwardPlan<T>;
#else
#include "batch_norm_backward.cu"
using Args = fastnorm::BatchNormBackward;
template <class T> using Plan = fastnorm::BackwardPlan<T>;
#endif

template <class T> void print(const Args& a) {
  const Plan<T> plan(a);
  const bool resident = plan.resident.parts > 0;
  const fastnorm::Tiles& t = resident ? plan.resident : plan.streamed.second;
  const int cluster = resident ? plan.resident.parts : plan.streamed.cluster;
  std::printf("{\"resident\": %d, \"cluster\": %d, ", resident, cluster);
  std::printf("\"several\": %d, \"partial\": %d, ", t.several, t.partial);
  std::printf("\"scalar\": %d, \"copies\": %d}\n", t.scalar, t.copies);
}

int main(int, char** argv) {
  Args a{};
  cuda_emulator::options.sm_count = std::atoi(argv[1]);
  cuda_emulator::options.compute_capability = std::atoi(argv[2]);
  a.n = std::atoll(argv[3]), a.c = std::atoll(argv[4]), a.hw = std::atoll(argv[5]);
  a.channels_last = std::atoi(argv[6]);
  a.dtype = fastnorm::DType(std::atoi(argv[7])), a.training = true;
  auto pointer = [](long offset) { return reinterpret_cast<void*>(4096 + offset); };
  a.x = pointer(std::atol(argv[8]));
#ifdef FORWARD
  a.y = pointer(std::atol(argv[9]));
#else
  a.dy = a.x, a.dx = pointer(std::atol(argv[9])), a.dweight = a.dbias = pointer(0);
#endif
  fastnorm::with_type(a.dtype, [&](auto type) { print<decltype(type)>(a); });
}
"""
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # in the order of csrc/dtype.h
H200, A100, T4 = (132, 90), (108, 80), (40, 75)  # multiprocessors, compute capability


@functools.cache
def program(direction: str):
    source = build.CACHE / f"batch_norm_plan_{direction}.cpp"
    source.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists() or source.read_text() != PROGRAM:
        source.write_text(PROGRAM)
    output = source.with_suffix("")
    flags = [f for f in build.kernel_flags("plain") if f != "-Wall"]
    with build.locked(output.name):
        build.make(output, [build.compiler(), *flags, f"-D{direction.upper()}", str(source)])
    return output


def plan(device, shape, layout="planes", dtype=torch.float32, direction="forward", x=0, y=0) -> dict:
    """The launch code's choice for x and y that are so many bytes away from a 16-byte boundary."""
    arguments = [*device, *shape, int(layout == "rows"), DTYPES.index(dtype), x, y]
    return json.loads(subprocess.check_output([program(direction), *map(str, arguments)]))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(32, 64, 12544), (32, 64, 3136), (32, 512, 784), (32, 1024, 196), (32, 2048, 49)])
def test_resnet50_is_read_once(shape, dtype, direction):
    chosen = plan(H200, shape, "planes", dtype, direction)
    assert chosen["resident"] and not chosen["partial"], chosen
    assert chosen["several"] == (shape[2] * 16 // dtype.itemsize % 16 != 0 or shape[2] * dtype.itemsize % 16 != 0)


def test_without_clusters_large_channels_are_streamed():
    assert plan(A100, (32, 512, 784))["resident"]  # 100 KB a channel, of 163
    assert not plan(A100, (32, 64, 3136))["resident"]
    assert not plan(T4, (32, 512, 784))["resident"]


def test_rows():
    assert plan(H200, (32, 2048, 49), "rows")["resident"]
    assert not plan(H200, (32, 64, 12544), "rows")["resident"]
    assert plan(H200, (32, 64, 12544), "rows")["cluster"] == 8  # of the first kernel, for fewer partial sums
    assert plan(H200, (33, 65, 1), "rows")["copies"] == 1  # eight rows at once
    assert plan(H200, (33, 2001, 1), "rows")["copies"] == 8


def test_alignment():
    assert not plan(H200, (32, 64, 196), x=8, y=8)["scalar"]  # alike, so slots can be aligned
    assert plan(H200, (32, 64, 196), x=8, y=8)["partial"]
    assert plan(H200, (32, 64, 196), x=8, y=4)["scalar"]
    assert plan(H200, (32, 64, 196), "rows", x=8, y=8)["scalar"]  # lanes would change channels
    assert plan(H200, (32, 3, 49))["several"] == 0  # 147 elements a sample: one channel at a time, with heads and tails


# What each of them is, shape, layout, sm_count, compute capability, as the emulator has it.
CASES = {
    "resident": ((5, 3, 300), "planes", 4, 90),
    "resident, heads and tails": ((5, 3, 301), "planes", 4, 90),
    "resident, several channels": ((5, 8, 49), "planes", 4, 90),
    "resident, tiny planes": ((5, 9, 4), "planes", 4, 90),
    "resident, cluster": ((4, 2, 4096), "planes", 4, 90),
    "resident, cluster, split planes": ((1, 2, 19001), "planes", 4, 90),
    "resident, rows": ((40, 24, 3), "rows", 4, 90),
    "resident, rows, cluster": ((700, 64, 1), "rows", 4, 90),
    "resident, folded rows": ((33, 65, 1), "rows", 4, 90),
    "streamed": ((3, 2, 12000), "planes", 4, 75),
    "streamed, heads and tails": ((3, 2, 12001), "planes", 4, 75),
    "streamed, several channels": ((350, 8, 49), "planes", 4, 75),
    "streamed, rows": ((700, 64, 1), "rows", 4, 75),
    "streamed, rows, cluster": ((15000, 32, 1), "rows", 16, 90),
    "streamed, folded rows": ((3000, 6, 1), "rows", 4, 75),
    "streamed, copies": ((40, 2001, 1), "rows", 4, 90),
}


@pytest.mark.parametrize("case", CASES)
def test_variant_is_right(case):
    shape, layout, sm_count, compute_capability = CASES[case]
    device = sm_count, compute_capability
    chosen = plan(device, shape, layout)
    assert chosen["resident"] == case.startswith("resident"), chosen
    assert (chosen["cluster"] > 1) == ("cluster" in case), chosen
    assert chosen["several"] == any(word in case for word in ("several", "tiny", "rows", "copies")), chosen
    assert (chosen["copies"] > 1) == ("copies" in case), chosen

    library()
    operators = torch.ops.fastnorm_emu
    torch.manual_seed(1)
    layout = torch.channels_last if layout == "rows" else torch.contiguous_format
    x, residual, dy = (torch.randn(*shape, 1).contiguous(memory_format=layout) for _ in range(3))
    weight, bias = torch.rand(2, shape[1]).add(0.5)

    def run(schedule, blocks_at_once):
        configure(
            schedule, seed=5, blocks_at_once=blocks_at_once, sm_count=sm_count, compute_capability=compute_capability
        )
        running = torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(3)
        y, stats, mask = operators.batch_norm_forward(
            x, residual, weight, bias, *running, True, None, 1e-5, "relu", 0.0, True
        )
        gradients = operators.batch_norm_backward(
            dy, x, None, weight, bias, stats, mask, True, 1e-5, "relu", 0.0, [True] * 4
        )
        return [y, stats, mask, *running, *gradients]

    results = run("random", 1)
    try:
        for schedule, blocks_at_once in zip(SCHEDULES, (1, 3, 5), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(results, run(schedule, blocks_at_once), strict=True))
    finally:
        configure()

    y, _, _, mean, var, count, dx, dresidual, dweight, dbias = results
    inputs = [t.double().requires_grad_() for t in (x, residual, weight, bias)]
    expected_mean, expected_var = torch.zeros(shape[1]).double(), torch.ones(shape[1]).double()
    z = torch.nn.functional.batch_norm(inputs[0], expected_mean, expected_var, *inputs[2:], True, 0.25) + inputs[1]
    on = y > 0  # where z is about 0, either slope is right
    expected = torch.autograd.grad(z, inputs, dy.double() * on)
    assert count == 4
    for actual, right in zip(
        [y, mean, var, dx, dresidual, dweight, dbias],
        [z.detach().relu(), expected_mean, expected_var, *expected],
        strict=True,
    ):
        torch.testing.assert_close(actual.double(), right, atol=5e-6 * float(right.abs().max()), rtol=0)
