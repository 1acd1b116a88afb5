"""The CUDA emulator catches faults in the real kernels.

A copy of csrc/cuda is changed so that each fault below can be switched on when it runs, and built in the emulator's
variants.  Every fault has to make a run fail, in the variant and for the reason that are written beside it; with none
switched on the same build passes everywhere.  Where a line that a fault changes has been rewritten, the test says so:
give the fault another place of the same kind.

As a program, `test_cuda_faults.py LIBRARY FAULT`, this file is the process that a fault runs in.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_emulator import build

SOURCES = build.ROOT / "csrc/cuda"
OPS = ("batch_norm", "group_norm", "layer_norm")  # what main() runs


@dataclass
class Fault:
    file: str
    old: str  # text that occurs once
    new: str  # FAULT stands for the condition that this fault is switched on
    variant: str
    reason: str  # in the output of the run, a regular expression


FAULTS = {
    "barrier removed": Fault(
        "reduce.cuh",
        "if (lane == 0) scratch[warp] = v;\n  __syncthreads();",
        "if (lane == 0) scratch[warp] = v;\n  if (!FAULT) __syncthreads();",
        "thread",
        "ThreadSanitizer: data race",
    ),
    "cluster barrier removed": Fault(
        "reduce.cuh",
        "  cluster_sync();\n",
        "  if (!FAULT) cluster_sync();\n",
        "plain",
        r"reduce\.cuh:\d+: cluster_shared\(\) before a first cluster_sync\(\)",
    ),
    "copy not waited for": Fault(
        "batch_norm_forward.cu",
        "__pipeline_wait_prior(1);",
        "if (!FAULT) __pipeline_wait_prior(1);",
        "plain",
        "wrong result",
    ),
    "read past a row": Fault(
        "vector.cuh",
        "if (valid == kAllLanes<T>) return *reinterpret_cast<const Vector<T>*>(p);",
        "if (valid == kAllLanes<T> || FAULT) return *reinterpret_cast<const Vector<T>*>(p);",
        "address",
        "AddressSanitizer: heap-buffer-overflow|misaligned address",
    ),
    "tail skipped": Fault(
        "vector.cuh",
        "if (valid >> i & 1) p[i] = v.lane[i];",
        "if ((valid >> i & 1) && !FAULT) p[i] = v.lane[i];",
        "plain",
        "wrong result",
    ),
    "two blocks write one output": Fault(
        "batch_norm.cuh",
        "return at.part == 0 && channel < t.c;",
        "return (at.part == 0 || FAULT) && channel < t.c;",
        "thread",
        "ThreadSanitizer: data race",
    ),
    "barrier of a row removed": Fault(
        "rows.cuh",
        "sums[i * 32 + lane / 32] = v[i];\n    __syncthreads();",
        "sums[i * 32 + lane / 32] = v[i];\n    if (!FAULT) __syncthreads();",
        "thread",
        "ThreadSanitizer: data race",
    ),
    "cluster barrier of a row removed": Fault(
        "rows.cuh",
        "    cluster_sync();\n",
        "    if (!FAULT) cluster_sync();\n",
        "plain",
        r"rows\.cuh:\d+: cluster_shared\(\) before a first cluster_sync\(\)",
    ),
    "slot past a plane": Fault(
        "rows.cuh",
        "left > 0 ? (1u << int(left)) - 1 : 0;",
        "left > 0 || FAULT ? (1u << int(left & 3)) - 1 : 0;",
        "plain",
        "wrong result",
    ),
    "columns added up too early": Fault(
        "layer_norm_backward_rows.cuh",
        "  __pipeline_wait_prior(0);\n  __syncthreads();\n",
        "  __pipeline_wait_prior(0);\n  if (!FAULT) __syncthreads();\n",
        "thread",
        "ThreadSanitizer: data race",
    ),
    "slots of a plane added up too early": Fault(
        "group_norm_backward_planes.cuh",
        "  team.sync();\n  A sums",
        "  if (!FAULT) team.sync();\n  A sums",
        "thread",
        "ThreadSanitizer: data race",
    ),
    "a group's mean forgotten": Fault(
        "group_norm_resident.cuh",
        "mean[i] = A(group_sums[channel_of_sum<T, true>(t, i) / each] * inverse);",
        "mean[i] = FAULT ? A(0) : A(group_sums[channel_of_sum<T, true>(t, i) / each] * inverse);",
        "plain",
        "wrong result",
    ),
}


def replace(folder: Path, file: str, old: str, new: str) -> None:
    path = folder / file
    assert path.exists(), f"csrc/cuda/{file} is gone: the faults of this test need another place"
    text = path.read_text()
    assert text.count(old) == 1, f"csrc/cuda/{file} has {text.count(old)} times what a fault replaces:\n{old}"
    path.write_text(text.replace(old, new))


def copy_with_faults(folder: Path) -> None:
    """csrc/cuda with `int fastnorm_fault` that chooses one of FAULTS, counted from 1, and with float32 only."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SOURCES, folder)
    switch = '#include "device_functions.h"\nextern "C" {\n'
    switch += 'inline __attribute__((used, visibility("default"))) int fastnorm_fault = 0;\n}\n'
    replace(folder, "launch.cuh", '#include "device_functions.h"\n', switch)
    for number, fault in enumerate(FAULTS.values(), 1):
        replace(folder, fault.file, fault.old, fault.new.replace("FAULT", f"(fastnorm_fault == {number})"))
    dtypes = re.compile(
        r"^ *case DType::k(?:Float64|Float16|BFloat16): return f\(.*\n", re.M
    )  # they take time to build
    files = [p for p in folder.iterdir() if dtypes.search(p.read_text())]
    assert files, "the switch over dtypes has changed: see copy_with_faults()"
    for path in files:
        path.write_text(dtypes.sub("", path.read_text()))


@pytest.fixture(scope="module")
def run():
    """run(variant, fault) -> (whether it passed, its output)"""
    if reason := build.unavailable_reason():
        pytest.skip(reason)
    folder = build.CACHE / "faults"
    copy_with_faults(folder)
    kernels = {path.name: path for path in folder.glob("*.cu")}

    def run_fault(variant: str, fault: int) -> tuple[bool, str]:
        library = build.build_module(variant, kernels, "fastnorm_faults", OPS)
        environment = {**os.environ, **build.sanitizer_environment(variant)}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # torch warns that emulated operators take the place of others
        command = [sys.executable, __file__, str(library), str(fault)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return result.returncode == 0, result.stdout + result.stderr

    return run_fault


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_without_a_fault_it_passes(run, variant):
    passed, output = run(variant, 0)
    assert passed and output == "", output


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(run, fault):
    passed, output = run(FAULTS[fault].variant, 1 + list(FAULTS).index(fault))
    assert not passed and re.search(FAULTS[fault].reason, output), output or "nothing was noticed"


def check_batch_norm(shape, layout) -> None:
    import torch

    from fastnorm.functional import batch_norm

    x = torch.randn(shape).add(3).to(memory_format=layout)
    weight, bias = torch.randn(2, shape[1])
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    y = batch_norm(x, mean, var, weight, bias, True)
    right = torch.nn.functional.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    expected_mean, expected_var = x.mean((0, 2, 3)) * 0.1, 0.9 + x.var((0, 2, 3)) * 0.1
    compare(shape, [(y, right.float()), (mean, expected_mean), (var, expected_var)])


def check_group_norm(shape, layout, groups=2) -> None:
    import torch

    operators = torch.ops.fastnorm_emu
    x, dy = (torch.randn(shape).add(3).to(memory_format=layout) for _ in range(2))
    weight, bias = torch.randn(2, shape[1])
    y, stats, _ = operators.group_norm_forward(x, None, weight, bias, groups, 1e-5, "none", 0.0, False)
    gradients = operators.group_norm_backward(
        dy, x, None, weight, bias, stats, None, groups, 1e-5, "none", 0.0, [True, False, True, True]
    )
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    right = torch.nn.functional.group_norm(inputs[0], groups, *inputs[1:])
    expected = torch.autograd.grad(right, inputs, dy.double())
    compare(shape, [(y, right), *zip((gradients[0], *gradients[2:]), expected, strict=True)])


def check_layer_norm(shape) -> None:
    import torch

    operators = torch.ops.fastnorm_emu
    x, dy = torch.randn(2, *shape).add(3)
    weight, bias, cols = *torch.randn(2, shape[1]), [shape[1]]
    y, _, stats, _ = operators.layer_norm_forward(x, None, None, weight, bias, cols, 1, False, 1e-5, "none", 0.0, False)
    gradients = operators.layer_norm_backward(
        dy, x, None, weight, bias, stats, None, None, cols, 1, False, 1e-5, "none", 0.0, [True, False, True, True]
    )
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    right = torch.nn.functional.layer_norm(inputs[0].movedim(1, -1), cols, *inputs[1:]).movedim(-1, 1)
    expected = torch.autograd.grad(right, inputs, dy.double())
    compare(shape, [(y, right), *zip((gradients[0], *gradients[2:]), expected, strict=True)])


def compare(shape, results) -> None:
    for actual, right in results:
        if not ((actual - right).abs() <= 1e-5 * right.abs().max() + 1e-5).all():
            sys.exit(f"wrong result for {shape}")


def main(path: str, fault: int) -> None:
    os.environ["FASTNORM_EMULATOR_LIBRARY"] = path
    import torch
    from cuda_emulator import configure, emulation, library

    torch.use_deterministic_algorithms(True)  # so that torch.empty() gives NaN
    torch.manual_seed(1)
    ctypes.c_int.in_dll(library(), "fastnorm_fault").value = fault
    planes, rows = torch.contiguous_format, torch.channels_last
    cases = [  # check, its arguments, the device: each goes another way through the kernels
        (check_batch_norm, ((3, 5, 7, 9), planes), 90),  # planes that are not whole vectors
        (check_batch_norm, ((4, 6, 3, 2), planes), 90),  # several channels a block
        (check_batch_norm, ((2, 3, 50, 51), planes), 90),  # a cluster
        (check_batch_norm, ((3, 24, 4, 5), rows), 90),
        (check_batch_norm, ((3, 7, 3, 5), rows), 80),
        (check_batch_norm, ((1, 2, 150, 121), planes), 75),  # more than one block's shared memory
        (check_group_norm, ((3, 6, 5, 7), planes), 90),
        (check_group_norm, ((1, 4, 37, 47), planes), 90),
        (check_group_norm, ((1, 2, 131, 141), planes), 75),
        (check_group_norm, ((2, 24, 9, 5), rows), 90),
        (check_group_norm, ((1, 64, 31, 23), rows), 75),
        (check_layer_norm, ((9, 77),), 90),
        (check_layer_norm, ((3, 1501),), 90),
        (check_layer_norm, ((1, 20003),), 90),
        (check_layer_norm, ((2, 9, 3, 5),), 90),
    ]
    with emulation():
        for number, (check, arguments, compute_capability) in enumerate(cases):
            configure(("forward", "reverse", "random")[number % 3], compute_capability=compute_capability)
            check(*arguments)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
