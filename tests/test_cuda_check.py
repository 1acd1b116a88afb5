"""The check of the CUDA code refuses what it should (on small kernels of its own)."""

import subprocess
import sys

import cuda_check
import pytest

NVCC = cuda_check.find_tool("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_cuobjdump = pytest.mark.skipif(
    NVCC is None or cuda_check.find_tool("cuobjdump", NVCC) is None, reason="no nvcc, or no cuobjdump"
)

KERNELS = r"""
template <class T, int V> __global__ void copy_kernel(const T* x, T* y) { y[threadIdx.x] = x[threadIdx.x]; }
template __global__ void copy_kernel<float4, 4>(const float4*, float4*);
template __global__ void copy_kernel<float, 1>(const float*, float*);
#ifdef NARROW
template __global__ void copy_kernel<float, 4>(const float*, float*);
#endif
#ifdef ATOMIC
__global__ void atomic_kernel(const float* x, float* y) { atomicAdd(y, x[threadIdx.x]); }
#endif
#ifdef SHARED_ATOMIC
__global__ void atomic_kernel(const float* x, float* y) {
  __shared__ float sum;
  atomicAdd(&sum, x[threadIdx.x]);
  __syncthreads();
  y[threadIdx.x] = sum;
}
#endif
#ifdef INTEGER_ATOMIC
__global__ void atomic_kernel(const int* x, int* y) {
  __shared__ int sum;
  atomicAdd(&sum, x[threadIdx.x]);
  __syncthreads();
  atomicMax(y, sum);
}
#endif
#ifdef STACK
__global__ void stack_kernel(const float* x, float* y, int n) {
  float v[256];
  for (int i = 0; i < n; i++) v[i * 7 % 256] = x[i];
  y[threadIdx.x] = v[n];
}
#endif
#ifdef UNUSED
__global__ void unused_kernel(float* y) { int unused; y[0] = 1; }
#endif
"""


def check(folder, define: str) -> tuple[int, str]:
    source = folder / "kernels.cu"
    source.write_text(f"#define {define}\n{KERNELS}")
    command = [sys.executable, cuda_check.__file__, "--archs", "80,90", source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout + result.stderr


@needs_cuobjdump
@pytest.mark.parametrize("define", ["NOTHING", "INTEGER_ATOMIC"])
def test_right_kernels_pass(tmp_path, define):
    status, output = check(tmp_path, define)
    assert status == 0 and "cuda-check: ok" in output, output
    row = next(line for line in output.splitlines() if line.startswith("copy_kernel<float4, 4>"))
    assert row.endswith("1 of 1          1 of 1"), output


@needs_cuobjdump
@pytest.mark.parametrize(
    ("define", "message"),
    [
        ("NARROW", "copy_kernel<float, 4>: no 16-byte loads on sm_80/90"),
        ("ATOMIC", "atomic_kernel: floating-point atomics on sm_80/90"),
        ("SHARED_ATOMIC", "atomic_kernel: floating-point atomics on sm_80/90"),
    ],
)
def test_machine_code_is_refused(tmp_path, define, message):
    status, output = check(tmp_path, define)
    assert status == 1 and message in output, output


@needs_nvcc
@pytest.mark.parametrize(
    ("define", "message"),
    [("STACK", "stack_kernel: local memory on sm_80/90"), ("UNUSED", "error #177-D")],
)
def test_what_compilers_warn_of_is_refused(tmp_path, define, message):
    status, output = check(tmp_path, define)
    assert status == 1 and message in output, output


def test_without_nvcc_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda_check, "find_tool", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["cuda_check.py"])
    assert cuda_check.main() == 0
    assert capsys.readouterr().out.count("\n") == 1
