"""Make the tables and the picture of a result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .goals import GOALS, Goal, Rows, sampler_goals


def with_numbers(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows that were measured, by name."""
    return {row["name"]: row for row in result["rows"] if "skipped" not in row and "error" not in row}


def markdown(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown: goals, sampler, training, memory, kernels, and why some rows have no numbers."""
    rows, about = with_numbers(result), result["machine"]
    said = [f"**{about['gpu']}**, {about['date'][:10]}, commit {str(about['commit'])[:10]}, torch {about['torch']},"]
    said[0] += f" triton {about['triton']}, transformers {about['transformers']}"
    if about.get("nvidia_smi"):
        said[0] += f", driver {about['nvidia_smi'].get('driver_version')}"
    if result["setting"] == "dry":
        said += ["", "A trial of the script on toy models, without a GPU: none of these numbers means anything."]
    if "W" in rows:
        speed, w = rows["W"]["read_bytes_per_second"], rows["W"]
        said += ["", f"W = {w['w']:.3g} ms: {w['weight_bytes'] / 1e9:.3g} GB at {speed / 1e12:.3g} TB/s."]
    said += ["", "| | before | prototype | goal | measured | ms | met |", "|---|---|---|---|---|---|---|"]
    said += [_goal_line(goal, rows) for goal in GOALS]
    ways = {way for row in rows.values() for way in row.get("runs_by", ())}
    said += ["", *(f"A decoder ran {way}." for way in sorted(ways))]
    if "sampler" in rows:
        said += ["", *_sampler_table(rows["sampler"]["lines"])]
    if "training" in rows:
        said += ["", *_training_table(rows["training"])]
    peaks = [(name, row["peak_bytes"]) for name, row in rows.items() if "peak_bytes" in row]
    if peaks:
        said += ["", "| row | peak, GB |", "|---|---|", *(f"| {name} | {peak / 1e9:.2f} |" for name, peak in peaks)]
    for name in ("profile", "profile, nsys"):
        if name in rows:
            said += ["", *_profile_table(rows[name])]
    for name in ("gpu tests", "tokens, SmolLM2", "tokens, widened"):
        if name in rows:
            numbers = {k: v for k, v in rows[name].items() if isinstance(v, (int, float, str)) and k != "name"}
            said += ["", f"{name}: " + ", ".join(f"{key} {value}" for key, value in numbers.items())]
    missing = [
        f"{row['name']}: {row.get('skipped') or row['error']}" for row in result["rows"] if row["name"] not in rows
    ]
    if "running" in result:
        missing.append(f"{result['running']['name']}: the run ended in it")
    if missing:
        said += ["", "Without numbers:", "", *(f"- {each}" for each in missing)]
    return "\n".join(said) + "\n"


def _goal_line(goal: Goal, rows: Rows) -> str:
    sign = "≤" if goal.at_most else "≥"
    known = value_of(goal, rows)
    measured, met = ("-", "-") if known is None else (f"{known:.3g} {goal.unit}", "yes" if goal.met(known) else "no")
    source = next((row for row in rows.values() if "ms" in row and known is not None and row.get("x_w") == known), None)
    ms = "-" if source is None else f"{source['ms']:.3g}"
    limit = f"{sign} {goal.limit:g} {goal.unit}"
    return f"| {goal.title} | {goal.before} | {goal.prototype} | {limit} | {measured} | {ms} | {met} |"


def value_of(goal: Goal, rows: Rows) -> float | None:
    try:
        return goal.value(rows)
    except KeyError:
        return None


def _sampler_table(lines: list[dict[str, Any]]) -> list[str]:
    graph, eager = list(lines[0]["graph_us"]), list(lines[0]["eager_us"])
    titles = ["V", "R", "reading once, µs", *(f"graph: {name}" for name in graph), "Python", "host", *eager]
    said = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for line in lines:
        python = line["python_us"]["draw"]
        cells = [
            line["read_us"],
            *line["graph_us"].values(),
            python["us"],
            python["host_us"],
            *line["eager_us"].values(),
        ]
        said.append(f"| {line['vocab']} | {line['rows']} | {' | '.join(f'{cell:.3g}' for cell in cells)} |")
    said += ["", "| sampler | goal | measured |", "|---|---|---|"]
    for what, value, limit, unit in sampler_goals(lines):
        said.append(f"| {what} | ≤ {limit:g} {unit} | {'-' if value is None else f'{value:.3g} {unit}'} |")
    return said


def _training_table(row: Mapping[str, Any]) -> list[str]:
    names = [name for name in row["lines"][0] if name != "head"]
    said = [f"A loss over [{row['rows']}, {row['tokens']}] tokens, width {row['width']}, V = {row['vocab']}:", ""]
    said += [f"| head | {' | '.join(f'{name}, ms | GB' for name in names)} |", "|---" * (1 + 2 * len(names)) + "|"]
    for line in row["lines"]:
        cells = [f"{line[name]['ms']:.3g} | {line[name]['peak_bytes'] / 1e9:.3g}" for name in names]
        said.append(f"| {line['head']} | {' | '.join(cells)} |")
    return said


def _profile_table(row: Mapping[str, Any]) -> list[str]:
    said = [f"{row['tool']}, a token with 1 LoRA ARM: {row['launches_per_token']:.0f} kernels, "]
    said[0] += f"{row['device_us_per_token']:.0f} µs of them."
    said[0] += " ".join(f" {name} {count:.3g}." for name, count in row.get("host_calls", {}).items())
    said += ["", "| kernel | launches | µs |", "|---|---|---|"]
    return said + [f"| `{k['name'][:70]}` | {k['launches']:.3g} | {k['us']:.4g} |" for k in row["kernels"]]


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the rows whose unit is W beside their goals, and the sampler's times over R."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = with_numbers(result)
    shown = [(goal, value_of(goal, rows)) for goal in GOALS if goal.unit == "W"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    places = range(len(shown))
    left.barh(places, [value or 0 for _, value in shown], color="#4878a8")
    left.plot([goal.limit for goal, _ in shown], places, "|", color="#c85200", markersize=18, label="goal")
    left.axvline(1, color="black", linewidth=0.8)
    left.set_yticks(places, [goal.title for goal, _ in shown])
    left.set(title="a step, in reads of the base's weights (W)")
    left.invert_yaxis()
    left.legend()
    lines = rows.get("sampler", {}).get("lines", [])
    at = [line for line in lines if line["vocab"] == max(each["vocab"] for each in lines)]
    batch = [line["rows"] for line in at]
    for name in at[0]["graph_us"] if at else ():
        right.loglog(batch, [line["graph_us"][name] for line in at], "o-", label=f"graph: {name}")
    for name in at[0]["eager_us"] if at else ():
        right.loglog(batch, [line["eager_us"][name] for line in at], "x:", label=name)
    right.loglog(batch, [line["read_us"] for line in at], "--", color="black", label="reading the logits once")
    right.set(title="guided_sample, 1 ARM, the widest vocabulary", xlabel="rows", ylabel="µs")
    if at:
        right.legend(fontsize=7)
    about = result["machine"]
    figure.suptitle(f"{about['gpu']}, {about['date'][:10]}" + (" (toy sizes)" if result["setting"] == "dry" else ""))
    figure.savefig(path, dpi=110)
    plt.close(figure)
