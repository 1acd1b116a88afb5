"""``python -m fastnorm``: what was built; ``python -m fastnorm check``: whether it is right on this machine."""

import argparse
import sys

from ._check import CHECKS, check
from ._info import info


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastnorm", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    checking = commands.add_parser("check", help="gradients, agreement with torch and accuracy on this machine")
    checking.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(CHECKS)}; all by default")
    checking.add_argument("--device", help="cpu or cuda; by default each that is there")
    checking.add_argument("--dtype", help="float64, float32, float16 or bfloat16; all by default")
    given = parser.parse_args(arguments)
    if given.command == "check":
        try:
            return 0 if check(*given.ops, device=given.device, dtype=given.dtype) else 1
        except ValueError as error:
            checking.error(str(error))
    values = {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in info().items()}
    width = max(map(len, values))
    print("\n".join(f"{name.replace('_', ' '):{width}}  {value or '-'}" for name, value in values.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
