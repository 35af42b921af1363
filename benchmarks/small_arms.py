"""Table and plot of the scenario `weak`: small ARMs of several sizes, and the share of a gap that each recovers.

A small ARM is a folder that scripts/demo_arms/train_small.py wrote (`work/small`), or the `small` that ships. Its
genarm.json has the length of its distillation, its distance from the base, and its ranking of held-out pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_measures import Estimate

from genarm_fast import demo

SHIPPED = "small ARM, w = 1"  # row of the small ARM that ships
TARGETS = {"guided, w = 1": "#c1440e", "policy": "#4878a8"}  # row whose gain is to be recovered -> colour in the plot


def info(folder: Path) -> dict[str, Any]:
    """Return the contents of a distilled ARM's genarm.json. Raises ValueError if the folder has none."""
    path = folder / "genarm.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "distilled" not in found:
        raise ValueError(f"{folder}: expected a folder of train_small.py, with `distilled` in its genarm.json")
    return dict(found)


def name_of(folder: Path) -> str:
    """Return the name of a small ARM, which is made of its parameters in millions."""
    return f"small-{info(folder)['distilled']['parameters'] / 1e6:.1f}M"


def row_of(name: str) -> str:
    return f"{name} ARM, w = 1"


def described(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the properties of each small ARM, by its row.

    kl: KL(base || ARM) in nats, on text sampled at temperature 1. pairs: the number of held-out pairs."""
    found = {}
    for row, folder in ((SHIPPED, demo.arm("small")), *((row_of(name_of(folder)), folder) for folder in folders)):
        about = info(folder)
        found[row] = {
            "parameters": about["distilled"]["parameters"],
            "distilled_tokens": about["distilled"]["response_tokens"],
            "kl": about["agreement"]["text sampled at T=1.0"]["kl"],
            "pairs": about["metrics"]["pairs"],
            "accuracy": about["metrics"]["accuracy"],
            "standard_error": about["metrics"]["accuracy_stderr"],
        }
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return the ARMs as a Markdown table, the smallest first. The shipped ARM is last: it was distilled for longer."""

    def text(share: Mapping[str, float] | None) -> str:
        return "no gap" if share is None else str(Estimate(**share))

    targets = [target for target in TARGETS if target in result["methods"]]
    titles = ["parameters", "distilled on", "KL to the base", "held-out pairs", "P(positive)"]
    titles += [f"share of {target}" for target in targets] + ["CPU ms a token"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    sizes = result["small_arms"]
    for name in sorted(sizes, key=lambda name: (name == SHIPPED, sizes[name]["parameters"])):
        arm, row = sizes[name], result["methods"][name]
        shipped = " (ships)" if name == SHIPPED else ""
        cells = [f"{arm['parameters'] / 1e6:.1f} M{shipped}", f"{arm['distilled_tokens']:,} tokens", f"{arm['kl']:.2f}"]
        cells += [f"{arm['accuracy']:.3f} ± {1.96 * arm['standard_error']:.3f}", text(row["score"])]
        cells += [text(row[f"share of {target}"]) for target in targets] + [f"{row['cpu_ms_per_token']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plot the recovered shares over parameters, with 95 % intervals. A square marks the ARM that ships."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    sizes = result["small_arms"]
    equal = sorted((name for name in sizes if name != SHIPPED), key=lambda name: sizes[name]["parameters"])
    for side, (target, colour) in zip((0.98, 1.02), TARGETS.items()):
        shipped = f"{target}: the `small` that ships"
        for names, style, label, shift in ((equal, "o-", target, side), ([SHIPPED], "s", shipped, side**4)):
            shares = {name: result["methods"][name].get(f"share of {target}") for name in names}
            shown = [(shift * sizes[name]["parameters"] / 1e6, share) for name, share in shares.items() if share]
            if shown:
                at, values = [x for x, _ in shown], [share["value"] for _, share in shown]
                spread = [[share["value"] - share["low"] for _, share in shown]]
                spread += [[share["high"] - share["value"] for _, share in shown]]
                axis.errorbar(at, values, yerr=spread, fmt=style, color=colour, linewidth=1, capsize=3, label=label)
    axis.axhline(0, color="#333333", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="million parameters of the ARM", ylabel="share of the gap to the base")
    ticks = sorted({round(arm["parameters"] / 1e6, 1) for arm in sizes.values()})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
