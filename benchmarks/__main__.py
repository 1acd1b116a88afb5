"""``python -m benchmarks [op …]``: checks, times and reports fastnorm's kernels beside torch's."""

import argparse
import importlib
import pkgutil

import torch

import benchmarks

from . import common

NOT_OPS = {"__main__", "accuracy", "common", "gpu_check", "memory", "norms", "pools", "twins"}


def main() -> None:
    ops = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in NOT_OPS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(ops)}; default: all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", help="comma-separated: float32,bfloat16,…")
    parser.add_argument("--layout", default="nchw,nhwc", help="comma-separated: nchw,nhwc (channels_last)")
    parser.add_argument("--precision", default="highest", choices=["highest", "high", "medium"],
                        help="as torch.set_float32_matmul_precision")  # fmt: skip
    parser.add_argument("--threads", default="1", help="comma-separated, or all")
    parser.add_argument("--against", default="eager", help="comma-separated: eager,compile")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each comparison")
    parser.add_argument("--quick", action="store_true", help="a few cases only")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up bars and a roofline")
    args = parser.parse_args()
    if unknown := set(args.ops) - set(ops):
        parser.error(f"unknown op {', '.join(sorted(unknown))}; there are {', '.join(ops)}")
    torch.set_float32_matmul_precision(args.precision)
    against = args.against.split(",")
    if bad := set(against) - {"eager", "compile"}:
        parser.error(f"--against takes eager and compile, got {', '.join(sorted(bad))}")
    rows: list[common.Row] = []
    for threads in (torch.get_num_threads() if t == "all" else int(t) for t in args.threads.split(",")):
        about = common.machine(args.device, threads)
        print(", ".join(f"{k} {v}" for k, v in about.items()))
        for dtype in args.dtype.split(","):
            cases = [
                case
                for op in args.ops or ops
                for layout in args.layout.split(",")
                for case in importlib.import_module(f"benchmarks.{op}").cases(
                    args.device, dtype, layout, against, args.quick
                )
            ]

            def done(row: common.Row, about: dict = about) -> None:
                rows.append(row)
                if args.json:  # every time: a run that is cut short leaves what it measured
                    common.write_json(args.json, rows, about)

            measured = common.measure(cases, device=args.device, threads=threads, seconds=args.seconds, done=done)
            print(common.table(measured), flush=True)
    if args.plot:
        common.plot(args.plot, rows, about)


if __name__ == "__main__":
    main()
