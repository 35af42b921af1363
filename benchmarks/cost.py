"""Measures what every method of the quality tables costs, relative to the unguided base on the same engine.

    OMP_NUM_THREADS=1 python benchmarks/cost.py [--size short] [--tokens 128] [--batch 1 8 32] [--json FILE]
    python benchmarks/cost.py ... --quality quality-general.json --plot cost.png

Methods take turns in every round; the clock is CPU time of one thread. A figure is the time of a whole call with its
prompts. Stop tokens are off, so all methods make equally many tokens. "first token" is a call for one token. "published
stack" works like the published code. It runs two full models one after the other and takes a log-softmax of each; the
host reads the tokens at each step. Methods that search or sample many times run at the first batch size only.

Peak memory is that of a process that runs one method once, libraries and weights included. The engine holds all three
ARMs there, whatever their weights; methods that use its base hold the engine too. Published ratios: `PUBLISHED`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from baselines.interface import Params
from baselines.mixture import mixture
from quality_methods import REWARD, SIZES, Method, Models, Size, by_arms, general
from registry import text
from result_files import machine, peak_resident

from genarm_fast.bench.timing import clock_of, interval, take_turns

TEXT = "Write a short review of the film that you saw last night, and say whether you would see it again."
# Times of a 128-token response over that of the unguided base, on one H100, from the PALC paper: 5.67 and 7.88 s over
# 1.79 s. GenARM's own paper gives only seconds (7B, unknown GPU): guided 7.28, CARDS 87.09, Transfer-Q 130.53.
PUBLISHED = {"guided (H100, PALC's paper)": 5.67 / 1.79, "ARGS (H100, PALC's paper)": 7.88 / 1.79}
PUBLISHED_TO_GUIDED = {"CARDS (GenARM's paper)": 87.09 / 7.28, "Transfer-Q (GenARM's paper)": 130.53 / 7.28}


# Methods that are not measured, since each runs the same forwards as the method it maps to.
AS_DEAR_AS = {
    "control, w = 1": "base",
    "control, w = 2": "base",
    "guided, w = 0.5": "guided, w = 1",
    "guided, w = 2": "guided, w = 1",
    "the ARM alone": "policy",
    "rewarded fine-tune": "policy",
    "ARGS, sampling, w = 1": "ARGS, sampling, w = 10",
    "ARGS, sampling, w = 3": "ARGS, sampling, w = 10",
    "ARGS, greedy, w = 10": "ARGS, sampling, w = 10",
}


SEARCHES = ("best", "ARGS", "Transfer-Q")  # name prefixes of methods that take 2 to 20 times as long as the others


def methods(models: Models, size: Size) -> dict[str, Method]:
    """Return the methods of the quality table, and guidance by other ARMs and by the published stack."""
    found = {name: method for name, method in general(models, size).items() if name not in AS_DEAR_AS}
    found["guided by the small ARM, w = 1"] = by_arms(models, small=1.0)
    found["two ARMs, w = 0.5 each"] = by_arms(models, positive=0.5, concise=0.5)
    found["published stack, w = 1"] = lambda prompts, params: mixture(
        [models.base, models.arm_alone], [1.0, 1.0], prompts, params
    )
    return found


def prompts_of(models: Models, batch: int) -> list[list[int]]:
    """Return `batch` different prompts, since the engine computes equal prompts once.

    They are made without the engine: not every method loads it."""
    chats = [[{"role": "user", "content": f"{number}. {TEXT}"}] for number in range(1, batch + 1)]
    made = models.tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    return [list(ids) for ids in made]


def measure(
    models: Models, chosen: dict[str, Method], batch: int, tokens: int, rounds: int, slow_rounds: int
) -> dict[str, Any]:
    """Return each method's seconds, ratio to the base, seconds to the first token, and forwards per token.

    Methods that search or sample many times run `slow_rounds` rounds, all others `rounds`."""
    prompts, results = prompts_of(models, batch), {}
    _, clock = clock_of([torch.device("cpu")])
    slow = sorted(name for name in chosen if name.startswith(SEARCHES))
    turns = [([name for name in chosen if name not in slow], rounds)]
    turns += [(["base", *slow], slow_rounds)] if slow else []
    for names, times in turns:
        last: dict[str, Any] = {}

        def run(name: str, new: int, last: dict[str, Any] = last) -> Any:
            def turn(number: int) -> None:
                if number or new == 1:  # turn 0 warms up; the call of one token has warmed up the whole call too
                    last[name] = chosen[name](prompts, Params(new, seed=number))

            return turn

        first = take_turns({name: run(name, 1) for name in names}, times, clock)
        whole = take_turns({name: run(name, tokens) for name in names}, times, clock)
        for name in names:
            if name in results:
                continue
            made = sum(len(response.tokens) for response in last[name])
            forwards: dict[str, int] = {}
            for response in last[name]:
                for member, count in response.forwards.items():
                    forwards[member] = forwards.get(member, 0) + count
            results[name] = {
                "seconds": asdict(interval(whole[name])),
                "to_base": asdict(interval([a / b for a, b in zip(whole[name], whole["base"])])),
                "first_token_seconds": asdict(interval(first[name])),
                "forwards_per_token": {member: count / made for member, count in forwards.items()},
            }
    return results


def at_batch(chosen: dict[str, Method], batch: int, first: int) -> dict[str, Method]:
    """Return the methods that run at a batch size: all of them at the size `first`, else those that do not search."""
    return {name: method for name, method in chosen.items() if batch == first or not name.startswith(SEARCHES)}


def peak_memory(arguments: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Return each method's largest resident set in MiB, taken in a process of its own."""
    found = {}
    for name in names:
        command = [sys.executable, __file__, *arguments, "--child", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = float(output.split()[-1])
    return found


def plot(costs: dict[str, Any], quality: dict[str, Any], path: Path) -> None:
    """Plot the win rate over the cost of a response at the first batch size.

    A line joins the methods that no other method beats in both."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batch, measured = next(iter(costs["batches"].items()))
    rows = {name: measured.get(AS_DEAR_AS.get(name, name)) for name in quality["methods"]}
    shown = {
        name: (row["to_base"]["median"], quality["methods"][name]["win_rate"]) for name, row in rows.items() if row
    }
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, (cost, rate) in shown.items():
        spread = [[rate["value"] - rate["low"]], [rate["high"] - rate["value"]]]
        colour = "#c1440e" if name.startswith("guided") else "#4878a8"
        axis.errorbar(cost, rate["value"], yerr=spread, fmt="o", color=colour, ecolor="#c8d3e0", elinewidth=0.8)
        # If two labels would overlap, the lower point's label goes below it; at equal heights, the left point's does.
        near = [
            (other["value"], c)
            for c, other in shown.values()
            if abs(other["value"] - rate["value"]) < 0.02 and 1 < max(c / cost, cost / c) < 1.4
        ]
        place = (-6 if cost <= 1 else 6, -11 if any(each > (rate["value"], cost) for each in near) else 3)
        side = {"ha": "right" if cost <= 1 else "left", "fontsize": 8, "textcoords": "offset points"}
        axis.annotate(name, (cost, rate["value"]), xytext=place, **side)
    best, frontier = -1.0, []
    for cost, rate in sorted(shown.values(), key=lambda point: (point[0], -point[1]["value"])):
        if rate["value"] > best:
            best = rate["value"]
            frontier.append((cost, best))
    axis.step(*zip(*frontier), where="post", color="#333333", linewidth=0.8)
    axis.set(xscale="log", xlabel=f"time of a response over the base's, batch {batch}", ylabel="win rate over the base")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def published(costs: dict[str, Any]) -> str:
    """Return a Markdown table of the published ratios beside those measured here at the first batch size."""
    measured = next(iter(costs["batches"].values()))
    to_base = {name: row["to_base"]["median"] for name, row in measured.items()}
    guided = to_base.get("guided, w = 1")
    ours = {
        "guided (H100, PALC's paper)": [guided, to_base.get("published stack, w = 1")],
        "ARGS (H100, PALC's paper)": [to_base.get("ARGS, sampling, w = 10")],
        "Transfer-Q (GenARM's paper)": [
            value / guided for name, value in to_base.items() if name.startswith("Transfer-Q") and guided
        ],
    }
    lines = ["| published | its ratio | ours |", "|---|---|---|"]
    for of, ratios in (
        ("base", costs["published_to_base"]),
        ("guided decoding", costs["published_to_guided"]),
    ):
        for name, ratio in ratios.items():
            found = [f"{value:.1f}" for value in ours.get(name, []) if value is not None]
            lines.append(
                f"| {name}, to its {of} | {ratio:.2f} | {', and by the published stack '.join(found) or '-'} |"
            )
    return "\n".join(lines)


def table(costs: dict[str, Any]) -> str:
    """Return the costs as a Markdown table. The column of peak memory is left out if it was not measured."""
    titles = ["batch", "method", "seconds", "to the base", "first token, s", "forwards a token"]
    titles += ["peak MiB"] if costs["peak_mib"] else []
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for batch, measured in costs["batches"].items():
        for name, row in measured.items():
            forwards = ", ".join(f"{member} {count:.2g}" for member, count in row["forwards_per_token"].items())
            cells = [
                batch,
                name,
                text(row["seconds"]),
                text(row["to_base"]),
                text(row["first_token_seconds"]),
                forwards,
            ]
            if costs["peak_mib"]:
                memory = costs["peak_mib"].get(batch, {}).get(name)
                cells.append("" if memory is None else f"{memory:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def timed_before(path: Path | None, tokens: int, size: Size) -> dict[str, Any]:
    """Return the contents of a result file; exit with an error unless it has times of `tokens` tokens and this size."""
    costs = json.loads(path.read_text()) if path is not None and path.exists() else {}
    if (costs.get("tokens"), costs.get("size")) != (tokens, json.loads(json.dumps(asdict(size)))):
        raise SystemExit(f"--only-memory --json {path}: expected times of {tokens} tokens at this --size")
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", type=Path, default=REWARD, help="folder of baselines/trajectory_reward.py's output")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of methods that search (default: 1)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these, and the base")
    parser.add_argument("--size", choices=SIZES, default="full", help="of quality.py: N, k and rollouts")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out: a process a method")
    parser.add_argument(
        "--only-memory", action="store_true", help="add peak memory to the times in --json, at the same size and tokens"
    )
    parser.add_argument("--quality", type=Path, help="quality.py's result for `general`, for the plot")
    parser.add_argument("--plot", type=Path, help="draw quality over cost there (PNG)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plot and not args.quality:
        parser.error("--plot: expected --quality too")
    torch.set_num_threads(1)
    models = Models({}, args.reward)
    size = SIZES[args.size]
    chosen = methods(models, size)
    if args.child:
        chosen[args.child](prompts_of(models, args.batch[0]), Params(args.tokens))
        print(peak_resident() / 2**20)
        return
    if unknown := sorted(set(args.methods or ()) - set(chosen)):
        parser.error(f"--methods: {unknown[0]!r}: expected some of {', '.join(chosen)}")
    chosen = {name: chosen[name] for name in chosen if not args.methods or name in args.methods or name == "base"}
    by_batch = {batch: at_batch(chosen, batch, args.batch[0]) for batch in args.batch}
    own = ["--size", args.size, "--tokens", str(args.tokens)] + (["--reward", str(args.reward)] if args.reward else [])
    if args.only_memory:
        costs = timed_before(args.json, args.tokens, size)
    else:
        costs = {
            "machine": machine(),
            "tokens": args.tokens,
            "rounds": [args.rounds, args.slow_rounds],
            "size": asdict(size),
            "batches": {
                str(batch): measure(models, some, batch, args.tokens, args.rounds, args.slow_rounds)
                for batch, some in by_batch.items()
            },
            "peak_mib": {},
            "published_to_base": PUBLISHED,
            "published_to_guided": PUBLISHED_TO_GUIDED,
        }
    for batch, some in () if args.no_memory else by_batch.items():
        costs["peak_mib"][str(batch)] = peak_memory([*own, "--batch", str(batch)], list(some))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(costs, indent=1) + "\n")
    print(f"{table(costs)}\n\n{published(costs)}")
    if args.plot:
        plot(costs, json.loads(args.quality.read_text()), args.plot)


if __name__ == "__main__":
    main()
