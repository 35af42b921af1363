"""Draws the results of benchmarks/speculation.py.

python benchmarks/plot_speculation.py PICTURE RESULT.json ...

If a later file has the same models as an earlier one, only its results for batches above one are added.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

PLAIN = "K = 0"
COLOURS = ["#4878a8", "#c85200", "#5fa052", "#8c6bb1", "#7f7f7f"]


def name_of(result: dict[str, Any]) -> str:
    return f"{result['about']['arm']} + {result['about']['parameters'] / 1e9:.2g}B"


def by_k(result: dict[str, Any], value: str) -> tuple[list[int], list[float]]:
    """Return every fixed K, and the value of the result line of one row with K drafts per step."""
    lines = [line for line in result["lines"] if line["batch"] == 1 and line["contender"].startswith("K = ")]
    points = [(int(line["contender"][4:]), line[value]) for line in lines if line.get(value) is not None]
    return [k for k, _ in points], [found for _, found in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for result in (json.loads(path.read_text()) for path in args.results):
        same = [known for known in results if name_of(known) == name_of(result)]
        if same:
            same[0]["lines"] += [line for line in result["lines"] if line["batch"] > 1]
        else:
            results.append(result)

    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for result, colour in zip(results, COLOURS * len(results)):
        label = name_of(result)
        axes[0].plot(*by_k(result, f"x {PLAIN}"), "o-", color=colour, label=label)
        if model := result.get("model"):
            expected = model["measured verification"]
            axes[0].plot([int(k) for k in expected], list(expected.values()), "--", color=colour, linewidth=0.8)
            best = max(by_k(result, f"x {PLAIN}")[1])
            axes[2].plot(model["cost"], best, "o", color=colour, label=label)
        axes[1].plot(*by_k(result, "acceptance"), "o-", color=colour, label=label)
        auto = [line for line in result["lines"] if line["contender"] == "auto"]
        if len(auto) > 1:
            axes[3].plot([a["batch"] for a in auto], [a[f"x {PLAIN}"] for a in auto], "o-", color=colour, label=label)
    axes[0].set(title="speed-up over K = 0 (dashed: model)", xlabel="drafts per step, K")
    axes[1].set(title="acceptance (right drafts / drafts)", xlabel="drafts per step, K", ylim=(0, 1))
    axes[2].set(title="best speed-up over K = 0", xlabel="cost ratio, ARM forward / base forward", xlim=(0, None))
    axes[3].set(title="auto over K = 0", xlabel="batch size")
    for axis in (axes[0], axes[2], axes[3]):
        axis.axhline(1, color="black", linewidth=0.8)
    axes[0].legend(fontsize=8)
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
