"""Tables and plots of evaluate.py's runs, with 95 % confidence intervals by a bootstrap over prompts."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from judge import PreferenceJudge, SentimentJudge, caution, repetition, vader
from reviews import load

from genarm_fast.demo import arm, arm_names

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # has result_files, which writes tables into pages

RESAMPLES = 4000
POSITIVE, CONCISE = (0.0, 0.5, 1.0), (0.0, 1.0, 2.0)  # weights of the sweep over two ARMs
LABELS = {
    "base": "base",
    "self-1": "base as its own ARM, w = 1",
    "self-2": "base as its own ARM, w = 2",
    "positive-0.5": "`positive`, w = 0.5",
    "positive-1": "`positive`, w = 1",
    "concise-1": "`concise`, w = 1",
    "concise-2": "`concise`, w = 2",
    "small-1": "`small` (weak-to-strong), w = 1",
    "small-2": "`small` (weak-to-strong), w = 2",
    "hh-base": "base",
    "hh-self-1": "base as its own ARM, w = 1",
    "hh-harmless-1": "`harmless`, w = 1",
    "helpful-base": "base",
    "helpful-self-1": "base as its own ARM, w = 1",
    "helpful-helpful-1": "`helpful`, w = 1",
}
OBJECTIVES = {"hh-": "harmless", "helpful-": "helpful"}  # objective by the start of a condition's name


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def text(self, digits: int, signed: bool = False) -> str:
        mean, low, high = (f"{x:{'+' if signed else ''}.{digits}f}" for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def bootstrap(clusters: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Return the mean of `clusters` [n], one value per prompt, with the percentile interval over resampled prompts."""
    rng = np.random.default_rng(seed)
    means = clusters[rng.integers(len(clusters), size=(resamples, len(clusters)))].mean(1)
    return Estimate(float(clusters.mean()), *(float(q) for q in np.percentile(means, [2.5, 97.5])))


class Results:
    """The metrics of every condition, averaged over seeds: `values[condition][metric]` is an array over prompts."""

    def __init__(self, folder: Path, sentiment: SentimentJudge, preference: dict[str, PreferenceJudge]) -> None:
        self.values: dict[str, dict[str, np.ndarray]] = {}
        self.samples: dict[str, int] = {}
        runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for path in sorted(folder.glob("*.json")):
            run = json.loads(path.read_text(encoding="utf-8"))
            runs[run["condition"]].append(run)
        for name, group in runs.items():
            rows = [sample for run in group for sample in run["samples"]]
            texts = [row["text"] for row in rows]
            metrics = {
                "sentiment": sentiment(texts),
                "vader": vader(texts),
                "tokens": np.array([float(row["tokens"]) for row in rows]),
                "ended": np.array([float(row["finish_reason"] == "stop") for row in rows]),
                "repetition": repetition(texts),
                "caution": caution(texts),
                "asks": np.array([float("?" in text) for text in texts]),
            }
            for start, objective in OBJECTIVES.items():
                if name.startswith(start) and objective in preference:
                    metrics["preference"] = preference[objective](texts)
            self.values[name] = {key: value.reshape(len(group), -1).mean(0) for key, value in metrics.items()}
            self.samples[name] = len(rows)

    def estimate(self, condition: str, metric: str, against: str | None = None) -> Estimate:
        """Return the mean of a metric, or its mean difference from the condition `against`, prompt by prompt."""
        values = self.values[condition][metric]
        return bootstrap(values if against is None else values - self.values[against][metric])

    def table(self, conditions: list[str], columns: list[tuple[str, str, str | None, int]]) -> str:
        """Return a Markdown table. A column is (title, metric, condition to subtract, digits).

        Conditions without runs are left out."""
        lines = ["| condition | " + " | ".join(c[0] for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name in (c for c in conditions if c in self.values):
            cells = [
                "" if name == against else self.estimate(name, metric, against).text(digits, against is not None)
                for _, metric, against, digits in columns
            ]
            lines.append(f"| {LABELS[name]} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def grid(self) -> str:
        """Return a Markdown table of the weights of `positive` and `concise`, with VADER and tokens in each cell."""
        lines = ["| `positive` \\ `concise` | " + " | ".join(f"w = {c:g}" for c in CONCISE) + " |", "|---" * 4 + "|"]
        for p in POSITIVE:
            cells = []
            for c in CONCISE:
                name = grid_name(p, c)
                known = name in self.values
                cells.append(
                    f"{self.estimate(name, 'vader').text(2)}; {self.estimate(name, 'tokens').text(1)}" if known else "-"
                )
            lines.append(f"| w = {p:g} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def grid_name(positive: float, concise: float) -> str:
    parts = [f"{name}-{weight:g}" for name, weight in (("positive", positive), ("concise", concise)) if weight]
    return "-".join(parts) or "base"


def pair_accuracy() -> str:
    """Return a Markdown table of the accuracies on held-out pairs, from the reports of the shipped ARMs."""
    header = "| ARM | held-out pairs | base's accuracy | ARM's accuracy | shorter-wins accuracy |\n" + "|---" * 5 + "|"
    lines = [header]
    for name in arm_names():
        report = json.loads((arm(name) / "report.json").read_text(encoding="utf-8"))
        if final := report.get("final"):
            lines.append(
                f"| `{name}` | {final['pairs']} | {report['before']['accuracy']:.3f} | {final['accuracy']:.3f} "
                f"± {1.96 * final['accuracy_stderr']:.3f} | {final['length_baseline_accuracy']:.3f} |"
            )
    return "\n".join(lines)


def plot_sentiment(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure

    names = [n for n in ("base", "self-1", "positive-0.5", "positive-1", "concise-1", "small-1") if n in results.values]
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes: Any = figure.subplots(1, 2, sharey=True)
    for axis, metric, title in (
        (axes[0], "sentiment", "P(positive), classifier on other reviews"),
        (axes[1], "vader", "VADER compound"),
    ):
        for row, name in enumerate(names):
            e = results.estimate(name, metric)
            colour = "#c1440e" if name.startswith("positive") else "#52796f"
            axis.errorbar(e.mean, row, xerr=[[e.mean - e.low], [e.high - e.mean]], fmt="o", color=colour, capsize=3)
        axis.set(title=title, yticks=range(len(names)), yticklabels=[LABELS[n].replace("`", "") for n in names])
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)


def plot_tradeoff(results: Results, path: Path) -> None:
    """Plot one line for each weight of `positive`, along growing weights of `concise`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis: Any = figure.subplots()
    for p, colour in zip(POSITIVE, ("#52796f", "#e09f3e", "#c1440e")):
        names = [(c, grid_name(p, c)) for c in CONCISE if grid_name(p, c) in results.values]
        xs = [results.estimate(name, "tokens") for _, name in names]
        ys = [results.estimate(name, "vader") for _, name in names]
        axis.errorbar(
            [e.mean for e in xs],
            [e.mean for e in ys],
            xerr=np.array([[e.mean - e.low, e.high - e.mean] for e in xs]).T,
            yerr=np.array([[e.mean - e.low, e.high - e.mean] for e in ys]).T,
            fmt="o-",
            color=colour,
            elinewidth=0.7,
            label=f"positive w = {p:g}",
        )
        for (c, _), x, y in zip(names, xs, ys):
            axis.annotate(f"{c:g}", (x.mean, y.mean), xytext=(4, 5), textcoords="offset points", fontsize=8)
    axis.set(xlabel="tokens per answer (labels: weight of concise)", ylabel="VADER compound")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def write_report(runs: Path, docs: Path, reviews: Path | None, preference: dict[str, PreferenceJudge]) -> None:
    """Fill docs/results.md and docs/img. preference: word judges by their objectives."""
    from result_files import fill

    sentiment = SentimentJudge(load(reviews))
    results = Results(runs, sentiment, preference)
    judges = [f"{source} reviews: {accuracy:.3f}" for source, accuracy in sentiment.accuracy.items()]
    judges += [
        f"HH-RLHF pairs, {objective}: {judge.accuracy:.3f} (chosen less rejected: {bootstrap(judge.margins).text(2)})"
        for objective, judge in preference.items()
    ]
    samples = ", ".join(f"{LABELS.get(name, name)}: {n}" for name, n in results.samples.items() if n != 192)
    chat = ["base", "self-1", "self-2", "positive-0.5", "positive-1", "concise-1", "concise-2", "small-1", "small-2"]

    def word_judge(objective: str, start: str) -> list[Any]:
        others = [("word judge", None), ("Δ to base", f"{start}base"), ("Δ to own ARM, w = 1", f"{start}self-1")]
        return [(title, "preference", other, 2) for title, other in others] if objective in preference else []

    blocks = {
        "judges": "Accuracy on texts they were not fitted on: " + "; ".join(judges) + ".",
        "sentiment": results.table(
            chat,
            [
                ("P(positive)", "sentiment", None, 3),
                ("Δ to base", "sentiment", "base", 3),
                ("Δ to own ARM, w = 1", "sentiment", "self-1", 3),
                ("VADER", "vader", None, 2),
                ("Δ to base", "vader", "base", 2),
                ("Δ to own ARM, w = 1", "vader", "self-1", 2),
            ],
        ),
        "length": results.table(
            chat,
            [
                ("tokens", "tokens", None, 1),
                ("Δ to base", "tokens", "base", 1),
                ("Δ to own ARM, w = 1", "tokens", "self-1", 1),
                ("ended by itself", "ended", None, 2),
                ("repeated trigrams", "repetition", None, 3),
            ],
        ),
        "grid": results.grid(),
        "pairs": pair_accuracy(),
        "harmless": results.table(
            ["hh-base", "hh-self-1", "hh-harmless-1"],
            [
                ("caution", "caution", None, 2),
                ("Δ to base", "caution", "hh-base", 2),
                ("Δ to own ARM, w = 1", "caution", "hh-self-1", 2),
                *word_judge("harmless", "hh-"),
                ("tokens", "tokens", None, 1),
            ],
        ),
        "helpful": results.table(
            ["helpful-base", "helpful-self-1", "helpful-helpful-1"],
            [
                *word_judge("helpful", "helpful-"),
                ("asks back", "asks", None, 2),
                ("caution", "caution", None, 2),
                ("tokens", "tokens", None, 1),
                ("ended by itself", "ended", None, 2),
                ("repeated trigrams", "repetition", None, 3),
            ],
        ),
        "samples": "192 samples per row (64 prompts, 3 seeds)" + (f", but for {samples}." if samples else "."),
    }
    (docs / "img").mkdir(parents=True, exist_ok=True)
    plot_sentiment(results, docs / "img" / "sentiment.png")
    plot_tradeoff(results, docs / "img" / "tradeoff.png")
    path = docs / "results.md"
    path.write_text(fill(path.read_text(encoding="utf-8"), blocks), encoding="utf-8")
