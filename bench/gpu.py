"""The GPU table in one run: Qwen3-Coder-Next at full size with random weights, beside mlx-lm.

    python -m bench.gpu                           all parts, each in a process of its own, then the table
    python -m bench.gpu cuda mlx-lm --json R.json some parts; what R.json holds of others stays, and is shown too
    python -m bench.gpu --show R.json             the table of an earlier run

Parts, each of a few minutes: cuda (the CUDA backend: step, kernels, plain product, experts), operations (single
operations, stock MLX beside our MLX kernels), mlx-lm, stock and mlx (the model through mlx-lm, MLX's own operations,
our MLX kernels). A part that fails leaves the others. The part "cuda" needs mixbit[cuda]; the others MLX with Metal or
CUDA (mixbit[mlx-cuda]), and mlx-lm.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu_report import Report

PARTS = ("cuda", "operations", "mlx-lm", "stock", "mlx")


def measure(part: str, layers: int) -> Report:
    """One part, in this process."""
    report = Report()
    start = time.perf_counter()
    if part == "cuda":
        from bench import gpu_cuda

        facts = gpu_cuda.measure(report, layers)
    else:
        from bench import gpu_mlx

        facts = gpu_mlx.measure(report, part, layers)
    report.parts[part] = {**facts, "layers": str(layers), "seconds": f"{time.perf_counter() - start:.0f}"}
    return report


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--layers", type=int, default=48, help="of the model (default 48)")
    parser.add_argument("--json", type=Path, help="keep the results there, with those of other parts")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the table of a file, and measure nothing")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one part, in this process
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; choose of {', '.join(PARTS)}")
    if args.show is not None:
        print("\n".join(Report.load(args.show).lines()))
        return 0
    if args.here:
        for part in args.parts:
            measure(part, args.layers).save(args.json)
        return 0
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        kept = args.json or Path(folder) / "results.json"
        for part in args.parts or PARTS:  # a device gives its memory back only when the process ends
            print(f"--- {part}", flush=True)
            command = [sys.executable, "-m", "bench.gpu", part, "--here", "--json", str(kept)]
            done = subprocess.run([*command, "--layers", str(args.layers)], check=False)
            failed += [part] if done.returncode else []
        print()
        print("\n".join(Report.load(kept).lines()) if kept.exists() else "nothing was measured")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
