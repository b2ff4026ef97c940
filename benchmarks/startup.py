"""Start-up: wall seconds of ``import lowbit`` and of ``lowbit --help``, medians of fresh processes.

python benchmarks/startup.py --reps 9
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=9)
    reps = parser.parse_args().reps
    programs = {"python -c pass": "pass", "import lowbit": "import lowbit", "lowbit --help": _HELP}
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(reps):  # interleaved, so that a busy moment hits all of them
        for name, program in programs.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
            found[name].append(time.perf_counter() - started)
    print(json.dumps({name: round(statistics.median(times), 3) for name, times in found.items()}))


_HELP = "import sys; sys.argv = ['lowbit', '--help']; from lowbit.cli import main; main()"

if __name__ == "__main__":
    main()
