"""Compares guidance with other methods in three tables on SmolLM2-135M, each made by one command.

    python benchmarks/quality.py general|weak|front [--short | --quick] [--reward FOLDER] [--policy OBJECTIVE=FOLDER]
        [--rewarded FOLDER] [--small FOLDER, once a size] [--point SHARE=FOLDER, once a point]

A run can be resumed: a method's responses are one file in --runs, written as a whole, and existing files are not made
again. `--short` and `--quick` are reduced sizes with fewer prompts and short texts, so their intervals are wider. Every
method gets the same prompts, seeds and lengths. A method that is too expensive gets the first prompts only, and its row
says so. The judge is fitted on film reviews that no ARM, policy or reward model saw (split by a hash of the text). Its
accuracy on held-out reviews is in every result. The lexicon VADER is a second judge.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import small_arms
import torch
from front_measures import front_figures, points_table, single_points
from quality_measures import Estimate, distinct, mean, recovered, win_rate
from quality_methods import (
    OBJECTIVES,
    REWARD,
    SIZES,
    Method,
    Models,
    Size,
    fronts,
    general,
    shares,
    weak,
)
from quality_runs import Texts, collect, same_inputs
from result_files import machine

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "demo_arms"))  # has prompts and judges of the demo's ARMs

DUELS = {"over_policy": "wins over policy", "vader_over_policy": "VADER, over policy"}  # figure -> column of the table
# Reviews that are passed to the judge, which uses its half of them. Other sizes pass all: fitting takes minutes.
JUDGE_REVIEWS = {"quick": 6000, "short": 6000}


def judge_of(runs: Path, size: str) -> Any:
    """Return the sentiment judge. It is fitted once and kept in the folder `runs`."""
    from judge import SentimentJudge
    from reviews import digest, load

    path = runs / "judge.pickle"
    if not path.exists():
        reviews = sorted(load(), key=lambda review: digest(review.text))
        runs.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(SentimentJudge(reviews[: JUDGE_REVIEWS.get(size)])))
    return pickle.loads(path.read_bytes())


def described(texts: Texts, judge: Any, base: Texts) -> dict[str, Any]:
    """Return the figures of one method, for a row of the table."""
    from judge import vader

    per_token = -texts.nats.sum(1) / texts.tokens.sum(1)
    many = texts.prompts
    return {
        "prompts": many,
        "win_rate": asdict(win_rate(texts.scores(judge), base.scores(judge, many))),
        "score": asdict(mean(texts.scores(judge).mean(1))),
        "vader_win_rate": asdict(win_rate(texts.scores(vader), base.scores(vader, many))),
        "tokens": asdict(mean(texts.tokens.mean(1))),
        "repetition": asdict(mean(texts.repetition().mean(1))),
        "perplexity": float(np.exp(np.average(per_token, weights=texts.tokens.sum(1)))),
        "distinct_2": distinct(texts.texts),
        "forwards_per_token": texts.forwards,
        "cpu_ms_per_token": 1e3 * texts.seconds / texts.tokens.sum(),
    }


def add_duels(rows: dict[str, dict[str, Any]], found: dict[str, Texts], judge: Any) -> None:
    """Add to the rows every method's win rate over the trained policy, by both judges, if a policy was run."""
    from judge import vader

    if "policy" not in found:
        return
    for name, texts in found.items():
        for key, scored in zip(DUELS, (judge, vader)):
            if name != "policy":
                rows[name][key] = asdict(win_rate(texts.scores(scored), found["policy"].scores(scored, texts.prompts)))


def trace(models: Models, prompt: list[int], tokens: int) -> list[dict[str, Any]]:
    """Return the steps of one text, guided by the first objective and from half-way on by the second."""
    steps = []
    first, second = (dict.fromkeys(models.engine.arm_names, 0.0) | {name: 1.0} for name in OBJECTIVES)
    with models.engine.stream([prompt], weights=first, seed=1, max_new_tokens=tokens) as stream:
        for i, chunk in enumerate(stream):
            steps.append({"text": chunk.text, "weights": [list(each) for each in chunk.weights]})
            if i == tokens // 2:
                stream.set_weights(second)
    return steps


def methods_of(scenario: str, models: Models, size: Size) -> dict[str, Method]:
    if scenario == "general":
        return general(models, size)
    return weak(models) if scenario == "weak" else fronts(models, size.points)


def measure(
    scenario: str, models: Models, size: Size, name_of_size: str, runs: Path, only: Sequence[str] | None = None
) -> dict[str, Any]:
    from prompts import held_out_prompts

    many = size.front_prompts if scenario == "front" else size.prompts
    chats = [[{"role": "user", "content": prompt}] for prompt in held_out_prompts()[:many]]
    prompts = [request.token_ids[0] for request in models.engine.prepare(chats)]
    methods = methods_of(scenario, models, size)
    methods = {name: methods[name] for name in methods if not only or name == "base" or name in only}
    folder = runs / f"{many} prompts"  # scenarios share the responses of methods that they have in common
    same_inputs(folder, {"size": asdict(size), "adapters": models.inputs()})
    found = collect(models, methods, folder, prompts, size, perplexity=scenario != "front")
    judge = judge_of(runs, name_of_size)
    about = {"scenario": scenario, "size_name": name_of_size, "size": asdict(size), "prompts": len(prompts)}
    about |= {"judge_accuracy": judge.accuracy, "policies_by_dpo": models.trained_policies, "machine": machine()}
    if scenario == "front":
        about["single_points"] = single_points(found, judge, size, list(models.points))
        return about | {"methods": front_figures(found, judge, size), "trace": trace(models, prompts[0], 24)}
    rows = {name: described(texts, judge, found["base"]) for name, texts in found.items()}
    if scenario == "general":
        add_duels(rows, found, judge)
    if scenario == "weak":
        scores = {name: texts.scores(judge).mean(1) for name, texts in found.items()}
        small = ["control, w = 1", *(name for name in rows if name.startswith("small"))]
        for target in (name for name in small_arms.TARGETS if name in rows):
            for name in (name for name in small if name in rows):
                share = recovered(scores["base"], scores[name], scores[target])
                rows[name][f"share of {target}"] = None if share is None else asdict(share)
        described_arms = small_arms.described(list(models.small.values()))
        about["small_arms"] = {name: arm for name, arm in described_arms.items() if name in rows}
    return about | {"methods": rows}


def table(result: dict[str, Any]) -> str:
    """Return a scenario's result as a Markdown table."""

    def text(estimate: dict[str, float] | None) -> str:
        return "no gap" if estimate is None else str(Estimate(**estimate))

    if result["scenario"] == "front":
        lines = ["| method | hypervolume | mean inner product |", "|---|---|---|"]
        for name, row in result["methods"].items():
            lines.append(f"| {name} | {text(row['hypervolume'])} | {text(row['mean_inner_product'])} |")
        return "\n".join(lines)
    shares = sorted({key for row in result["methods"].values() for key in row if key.startswith("share")})
    titles = ["method", "win rate", "VADER win rate", "P(positive)", "tokens", "repeated trigrams", "perplexity"]
    titles += ["distinct bigrams", "forwards a token", "CPU ms a token", *shares]
    duels = [key for key in DUELS if any(key in row for row in result["methods"].values())]
    titles += [DUELS[key] for key in duels]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, row in result["methods"].items():
        forwards = ", ".join(f"{member} {count:.1f}" for member, count in row["forwards_per_token"].items())
        shown = name if row["prompts"] == result["prompts"] else f"{name} ({row['prompts']} prompts)"
        cells = [shown, text(row["win_rate"]), text(row["vader_win_rate"]), text(row["score"]), text(row["tokens"])]
        cells += [text(row["repetition"]), f"{row['perplexity']:.1f}", f"{row['distinct_2']:.2f}", forwards]
        cells.append(f"{row['cpu_ms_per_token']:.0f}")
        cells += [text(row[key]) if key in row else "" for key in (*shares, *duels)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def policies(given: Sequence[str]) -> dict[str, Path]:
    found = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not equals or name not in OBJECTIVES or not Path(folder).is_dir():
            raise SystemExit(f"--policy {each}: expected OBJECTIVE=FOLDER, an objective of {', '.join(OBJECTIVES)}")
        found[name] = Path(folder)
    return found


def point_folders(given: Sequence[str], size: Size) -> dict[float, Path]:
    found = {}
    for each in given:
        share, _, folder = each.partition("=")
        named = [a for a in shares(size.points) if share == f"{a:.2f}"]
        if not named or not Path(folder).is_dir():
            choices = ", ".join(f"{a:.2f}" for a in shares(size.points))
            raise SystemExit(f"--point {each}: expected SHARE=FOLDER, a share of {choices}")
        found[named[0]] = Path(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="+", choices=["general", "weak", "front"])
    parser.add_argument(
        "--short",
        dest="size",
        action="store_const",
        const="short",
        default="full",
        help="one seed: 16 minutes",
    )
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", help="a few prompts: minutes")
    parser.add_argument(
        "--reward", type=Path, default=REWARD, help="folder of baselines/trajectory_reward.py's output (default: ours)"
    )
    parser.add_argument("--policy", action="append", default=[], help="OBJECTIVE=FOLDER of baselines/dpo.py's output")
    parser.add_argument("--rewarded", type=Path, help="folder of baselines/rewarded.py's output, for a row")
    parser.add_argument(
        "--point", action="append", default=[], help="SHARE=FOLDER of baselines/per_point.py's output, for `front`"
    )
    parser.add_argument(
        "--small", type=Path, action="append", default=[], help="folder of an ARM of another size, for a row of `weak`"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of responses, kept")
    parser.add_argument("--json", type=Path, help="folder for quality-<scenario>.json")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="of general and weak, only these and the base")
    parser.add_argument("--prompts", type=int, help="instead of the size's")
    parser.add_argument("--tokens", type=int, help="longest response, instead of the size's")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.methods and "front" in args.scenarios:
        parser.error("--methods: expected general or weak, a front is of all its points")
    if args.rewarded and not args.rewarded.is_dir():
        parser.error(f"--rewarded {args.rewarded}: expected a folder that baselines/rewarded.py wrote")
    torch.set_num_threads(args.threads)
    changed = {name: getattr(args, name) for name in ("prompts", "tokens") if getattr(args, name) is not None}
    size = replace(SIZES[args.size], **changed)
    try:
        trained = policies(args.policy), args.reward, args.rewarded
        models = Models(*trained, small=args.small, points=point_folders(args.point, size))
    except ValueError as error:
        parser.error(f"--small: {error}")
    known = [name for scenario in args.scenarios for name in methods_of(scenario, models, size)]
    if unknown := [name for name in args.methods or () if name not in known]:
        parser.error(f"--methods {unknown[0]!r}: expected some of {', '.join(dict.fromkeys(known))}")
    for scenario in args.scenarios:
        result = measure(scenario, models, size, args.size, args.runs / args.size, args.methods)
        if args.json:
            args.json.mkdir(parents=True, exist_ok=True)
            tried = "-quick" if args.size == "quick" else ""  # a quick trial must not replace the figures of the docs
            (args.json / f"quality-{scenario}{tried}.json").write_text(json.dumps(result, indent=1) + "\n")
        accuracy = ", ".join(f"{source} {share:.3f}" for source, share in result["judge_accuracy"].items())
        print(f"\n{scenario}; judge's held-out accuracy: {accuracy}\n\n{table(result)}", flush=True)
        if result.get("single_points"):
            print(f"\n{points_table(result['single_points'])}", flush=True)


if __name__ == "__main__":
    main()
