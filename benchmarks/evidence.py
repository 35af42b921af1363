"""Writes the tables and plots of docs/results.md, from the heading "Beside other methods" on, from result files.

    python benchmarks/evidence.py     reads quality-*.json, cost.json and learning-curve.json in benchmarks/results;
                                      a missing file leaves its tables as they are

`make evidence`, `cost.py` and `learning_curve.py` make those files. No figure in the tables is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, TypeGuard

import cost
import learning_curve
import quality
import small_arms
from front_measures import points_table
from quality_methods import TRAINED
from registry import RESULTS
from result_files import fill

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
IMAGES = PAGE.parent / "img"
COLOURS = {"guided, sum 1": "#e08e45", "guided, sum 2": "#c1440e", "MOD": "#4878a8", "soup": "#52796f"}


def about(found: Mapping[str, Any]) -> str:
    """Return a sentence that says where and when the figures were measured."""
    on = found["machine"]
    threads = "one thread" if on["threads"] == 1 else f"{on['threads']} threads"
    return (
        f"{on['date']}, {on['cores']} cores of an {on['device']}, {on['capability']}, {threads}, "
        f"while other work ran beside (load {on['load']})."
    )


def judged(found: Mapping[str, Any]) -> str:
    size, trained = found["size"], found["policies_by_dpo"]
    accuracy = ", ".join(f"{source} {share:.3f}" for source, share in found["judge_accuracy"].items())
    policy = f"Policies by DPO: {', '.join(trained)}." if trained else "ARMs stand in for policies."
    return (
        f"{found['prompts']} prompts, up to {size['tokens']} tokens, {size['seeds']} seed(s). "
        f"The judge's accuracy on held-out reviews: {accuracy}. {policy} {about(found)}"
    )


def told(trace: list[Mapping[str, Any]]) -> str:
    """Return a text as a Markdown list, with an item for each run of tokens drawn with the same weights."""
    parts = []
    for weights, steps in groupby(trace, key=lambda step: step["weights"][0][:2] if step["weights"] else None):
        text = "".join(step["text"] for step in steps).replace("\n", " ")
        if weights is not None:
            parts.append(f"* (positive, concise) = ({weights[0]:g}, {weights[1]:g}): “{text.strip()}”")
    return "\n".join(parts)


def plot_front(found: Mapping[str, Any], path: Path) -> None:
    """Plot both objectives of every method's points. The labels at a method's ends are the shares of `positive`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, row in found["methods"].items():
        xs, ys = zip(*row["points"])
        volume = row["hypervolume"]
        label = f"{name}: hypervolume {volume['value']:.2f} [{volume['low']:.2f}, {volume['high']:.2f}]"
        axis.plot(xs, ys, "o-", markersize=4, linewidth=1, color=COLOURS[name], label=label)
        for share, at in (("0", 0), ("1", -1)):
            place = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8, "color": COLOURS[name]}
            axis.annotate(share, (xs[at], ys[at]), **place)
    for number, (share, at) in enumerate(found.get("single_points", {}).items()):
        x, y = (at[TRAINED][name]["value"] for name in ("positive", "short"))
        axis.plot(x, y, "x", color="#333333", label=None if number else "one policy, trained for the point")
        axis.annotate(share, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axis.set(xlabel="P(positive) by the judge (labels: share of `positive`)", ylabel="1 - tokens / limit")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def has_sizes(weak: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Whether `weak` has results of small ARMs of other sizes than the one that ships."""
    return weak is not None and len(weak.get("small_arms", ())) > 1


def blocks() -> dict[str, str]:
    """Return the text for each pair of marks in the page, by the name of the mark, for the result files that exist."""
    found = {name: read(f"quality-{name}") for name in ("general", "weak", "front")}
    tables = {name: f"{judged(each)}\n\n{quality.table(each)}" for name, each in found.items() if each}
    if has_sizes(found["weak"]):
        tables["sizes"] = small_arms.table(found["weak"])
    if found["front"]:
        if points := found["front"].get("single_points"):
            tables["points"] = points_table(points)
        tables["trace"] = told(found["front"]["trace"])
    if costs := read("cost"):
        shape = f"{costs['tokens']} tokens, {' and '.join(map(str, costs['rounds']))} round(s). {about(costs)}"
        tables |= {"cost": f"{shape}\n\n{cost.table(costs)}", "published": cost.published(costs)}
    if curves := read("learning-curve"):
        made = "\n".join(f"{objective}: {one['dtype']}, {about(one)}" for objective, one in curves.items())
        tables["curve"] = f"{made}\n\n{learning_curve.table(curves)}"
    return tables


def main() -> None:
    if front := read("quality-front"):
        plot_front(front, IMAGES / "front.png")
    if has_sizes(weak := read("quality-weak")):
        small_arms.plot(weak, IMAGES / "weak-sizes.png")
    general, costs = read("quality-general"), read("cost")
    if general and costs:
        cost.plot(costs, general, IMAGES / "cost.png")
    if curves := read("learning-curve"):
        learning_curve.plot(curves, IMAGES / "learning-curve.png")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), blocks()), encoding="utf-8")


if __name__ == "__main__":
    main()
