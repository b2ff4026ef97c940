"""Two tools' results of the same method, paired by window: the ratio of their KL with an interval.

    python beside.py SCORES lowbit-hqq-int3=hqq-int3 lowbit-nf4=bnb-nf4

``SCORES`` is the folder that score_dense.py wrote. Each pair is OURS=PEER; prints one JSON line a pair: the KL of both,
and the mean difference by window with its 95 % interval (Student's t over windows).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scipy import stats


def kl_windows(scores: Path, name: str) -> np.ndarray:
    report = json.loads((scores / f"{name}.score.json").read_text(encoding="utf-8"))
    return np.array(report["kl_window"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path)
    parser.add_argument("pairs", nargs="+", metavar="OURS=PEER")
    args = parser.parse_args()
    for pair in args.pairs:
        ours, peer = (kl_windows(args.scores, name) for name in pair.split("="))
        d, n = ours - peer, len(ours)
        half = float(stats.t.ppf(0.975, n - 1) * d.std(ddof=1) / n**0.5)
        print(json.dumps({
            "pair": pair, "ours": ours.mean(), "peer": peer.mean(), "ratio": ours.mean() / peer.mean(),
            "difference": [d.mean(), d.mean() - half, d.mean() + half], "windows": n,
        }))  # fmt: skip


if __name__ == "__main__":
    main()
