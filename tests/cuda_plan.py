"""What launch code chooses: programs that have a .cu file compiled in and print its plan for sizes and a device."""

from __future__ import annotations

import json
import subprocess
from functools import cache

import torch
from cuda_emulator import build

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # in the order of csrc/dtype.h
H200, A100, T4 = (132, 90), (108, 80), (40, 75)  # multiprocessors, compute capability

MAIN = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
%s
static std::vector<long> numbers;
static void* pointer(long offset) { return reinterpret_cast<void*>(4096 + offset); }
%s
int main(int count, char** argv) {
  cuda_emulator::options.sm_count = std::atoi(argv[1]);
  cuda_emulator::options.compute_capability = std::atoi(argv[2]);
  for (int i = 3; i < count; i++) numbers.push_back(std::atol(argv[i]));
  print_plan();
}
"""


@cache
def program(name: str, source: str, code: str):
    """The program with print_plan() from `code`, which finds the arguments in `numbers`."""
    text = MAIN % (f'#include "{source}"', code)
    file = build.CACHE / f"{name}_plan.cpp"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    output = file.with_suffix("")
    flags = [f for f in build.kernel_flags("plain") if f not in ("-Wall", "-O1")]
    with build.locked(output.name):
        build.make(output, [build.compiler(), *flags, str(file)])
    return output


@cache
def plan(name: str, source: str, code: str, device: tuple[int, int], *numbers: int) -> dict[str, int]:
    command = [program(name, source, code), *device, *map(int, numbers)]
    return json.loads(subprocess.check_output(list(map(str, command))))
