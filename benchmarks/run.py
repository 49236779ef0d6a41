"""Run all benchmarks, or those named: `make bench`, `make bench NAME=factorization`. Exits 1 when a bar is missed."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = ("paper_counts", "factorization", "families", "overhead")


def main() -> None:
    names = sys.argv[1:] or BENCHMARKS
    if unknown := set(names) - set(BENCHMARKS):
        sys.exit(f"There is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}.")
    failed = [name for name in names if subprocess.run([sys.executable, HERE / f"{name}.py"]).returncode]
    if failed:
        sys.exit(f"Bars missed or errors in: {', '.join(failed)}")


if __name__ == "__main__":
    main()
