"""Run all benchmarks but the long ones, or those named; exits 1 when a bar is missed.

make bench
make bench NAME=factorization
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = ("paper_counts", "factorization", "latency", "families", "overhead", "compress_cost", "engines")
# Long, in arms that resume: only by name.
LONG = ("compress", "paper_road", "quantization", "bench", "verification")


def main() -> None:
    names = sys.argv[1:] or BENCHMARKS
    if unknown := set(names) - {*BENCHMARKS, *LONG}:
        sys.exit(f"There is no benchmark {', '.join(sorted(unknown))}; there are {', '.join((*BENCHMARKS, *LONG))}.")
    failed = [name for name in names if subprocess.run([sys.executable, HERE / f"{name}.py"]).returncode]
    if failed:
        sys.exit(f"Bars missed or errors in: {', '.join(failed)}")


if __name__ == "__main__":
    main()
