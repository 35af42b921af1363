"""Measures how well an ARM ranks held-out pairs, as a curve over the number of its training pairs.

    python scripts/demo_arms/pairs_helpful.py hh-rlhf-helpful-base-test.jsonl.gz pairs/
    python benchmarks/learning_curve.py helpful pairs/ work/ [--pairs 128 512 512:epochs=3] [--json FILE]

Every point is a training of its own, by the recipe of scripts/demo_arms/train_arms.py, on pairs drawn at random. The
point 512:epochs=3,lora_rank=16 has 512 pairs and changes two settings of the recipe. All points are measured on the
same held-out pairs. Both responses of such a pair have the same number of tokens, so length decides nothing. A column
shows how often the shorter response wins among whole responses. Responses are ranked by Σ log π of the ARM. They are
also ranked by the ARM's Σ log π less the base's, which is what training added. "ARM less base" is the difference of the
rankings by ARM and base, pair by pair. If an ARM of that name ships, it is ranked too. Finished trainings and rankings
are kept in `work`, so a stopped run can be resumed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from baselines.interface import Member
from baselines.likelihoods import encoded, log_likelihoods, share_right
from peft import PeftModel
from result_files import machine
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from genarm_fast import demo
from genarm_fast.demo import base
from genarm_fast.train import TrainConfig, train
from genarm_fast.train.data import Pair, load_pairs

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "demo_arms"))  # has the recipe of the demo's ARMs

OBJECTIVES = ("harmless", "helpful")
DTYPE = torch.bfloat16  # multiplies twice as fast as float32 where AVX-512 has bfloat16


class Point(NamedTuple):
    """One training: the number of its pairs (None: all), and its changes to the settings of the recipe."""

    pairs: int | None
    changes: str = ""  # NAME=VALUE,NAME=VALUE

    @classmethod
    def parse(cls, text: str) -> Point:
        """Parse PAIRS or PAIRS:NAME=VALUE,... and check it, before anything is trained."""
        count, _, changes = text.partition(":")
        if not count.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r}: expected PAIRS or PAIRS:NAME=VALUE,..., e.g. 512:epochs=3")
        point = cls(int(count) or None, changes)
        try:
            TrainConfig(base="base", output="output", **point.settings)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
        return point

    @property
    def settings(self) -> dict[str, Any]:
        """The changed fields of `TrainConfig`. A value is read as JSON, or else as text."""
        changed = {}
        for each in self.changes.split(",") if self.changes else []:
            name, sign, value = each.partition("=")
            if not sign:
                raise ValueError(f"{each!r}: expected NAME=VALUE")
            try:
                changed[name] = json.loads(value)
            except json.JSONDecodeError:
                changed[name] = value
        return changed

    @property
    def name(self) -> str:
        """The point's name in the names of its files."""
        return "-".join([str(self.pairs or "all"), *(self.changes.split(",") if self.changes else [])])


def margins(arm: Path | None, pairs: list[Pair], kept: Path) -> Tensor:
    """Return Σ log π of the chosen response less that of the rejected one, [n], in nats.

    arm: None means the base. kept: a file with the result; it is read if it exists, else written."""
    if not kept.exists():
        adapter = arm is not None and (arm / "adapter_config.json").exists()
        source = base() if arm is None or adapter else arm
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPE, trust_remote_code=False)
        if adapter:
            model = PeftModel.from_pretrained(model, str(arm)).merge_and_unload()
        tokenizer = AutoTokenizer.from_pretrained(base(), trust_remote_code=False)
        values = list(log_likelihoods(Member("policy", model.eval()), *encoded(tokenizer, pairs, complete=False)))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps([good - bad for good, bad in zip(values[::2], values[1::2])]))
    return torch.tensor(json.loads(kept.read_text()), dtype=torch.float64)


def shorter(pairs: list[Pair]) -> dict[str, float]:
    """Return the share of pairs that are ranked right if the shorter response wins."""
    tokenizer = AutoTokenizer.from_pretrained(base(), trust_remote_code=False)
    lengths = torch.tensor([float(len(row)) for row in encoded(tokenizer, pairs, complete=False)[1]]).view(-1, 2)
    return share_right(lengths[:, 1] - lengths[:, 0])


def trained(objective: str, data: Path, output: Path, point: Point) -> dict[str, Any]:
    """Train the ARM of a point, unless `output` has it already, and return its report."""
    from train_arms import COMMON

    options = COMMON | {"beta": 0.05, "data_id": f"HH-RLHF, {objective}", "dtype": str(DTYPE).removeprefix("torch.")}
    options |= {"holdout_fraction": 0.0, "max_pairs": point.pairs} | point.settings
    return train(TrainConfig(base=str(base()), data=str(data), output=str(output), **options), progress=False).report


def curve(objective: str, folder: Path, work: Path, wanted: list[Point]) -> dict[str, Any]:
    held_out = load_pairs(str(folder / f"{objective}-held-out.jsonl")).pairs
    held_out.sort(key=lambda pair: len(str(pair.prompt)))  # a batch has prompts of similar length, so little padding
    whole = load_pairs(str(folder / f"{objective}-held-out-whole.jsonl")).pairs
    of_base = margins(None, held_out, work / f"{objective}-base.json")

    def ranked(of_arm: Tensor) -> dict[str, Any]:
        gain = (of_arm > 0).double() - (of_base > 0).double()  # pair by pair, since ARM and base rank the same pairs
        error = (gain.std() / len(gain) ** 0.5).item()
        rankings = {"arm": share_right(of_arm), "arm_over_base": share_right(of_arm - of_base)}
        return rankings | {"gain": {"value": gain.mean().item(), "standard_error": error}}

    points = []
    for point in wanted:
        output = work / f"{objective}-{point.name}"
        report = trained(objective, folder / f"{objective}.jsonl", output, point)
        of_arm = margins(output, held_out, work / f"{output.name}.json")
        data = {"pairs": report["data"]["train_pairs"], "steps": report["steps"], "seconds": report["seconds"]}
        points.append(data | {"changes": point.changes} | ranked(of_arm))
    ships = objective in demo.arm_names()
    shipped = ranked(margins(demo.arm(objective), held_out, work / f"{objective}-shipped.json")) if ships else None
    return {
        "held_out_pairs": len(held_out),
        "base": share_right(of_base),
        "shorter_whole": shorter(whole),
        "dtype": str(DTYPE).removeprefix("torch."),
        "machine": machine(),
        "points": points,
        "shipped": shipped,
    }


def table(found: dict[str, Any]) -> str:
    """Return the curves as a Markdown table, with accuracies ± 1.96 standard errors."""

    def text(share: dict[str, float]) -> str:
        return f"{share['accuracy']:.3f} ± {1.96 * share['standard_error']:.3f}"

    titles = ["objective", "training pairs", "changed settings", "held-out pairs", "ARM", "base", "ARM less base"]
    titles += ["ARM over base", "shorter, whole texts"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for objective, one in found.items():
        shipped = [one["shipped"] | {"pairs": "the ARM that ships", "changes": ""}] if one["shipped"] else []
        for point in [*one["points"], *shipped]:
            gain = f"{point['gain']['value']:+.3f} ± {1.96 * point['gain']['standard_error']:.3f}"
            changes = ", ".join(f"`{each}`" for each in point["changes"].split(",") if each)
            cells = [objective, str(point["pairs"]), changes, str(one["held_out_pairs"]), text(point["arm"])]
            cells += [text(one["base"]), gain, text(point["arm_over_base"]), text(one["shorter_whole"])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def usual(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a curve's points that change no setting of the recipe."""
    return [point for point in one["points"] if not point["changes"]]


def near(ticks: list[int]) -> list[list[int]]:
    """Group ascending numbers of pairs whose labels would overlap: those within a fifth of the group's first."""
    groups: list[list[int]] = []
    for tick in ticks:
        if groups and tick < 1.2 * groups[-1][0]:
            groups[-1].append(tick)
        else:
            groups.append([tick])
    return groups


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot accuracy over training pairs with 95 % intervals, for the unchanged recipe, and a line at chance.

    The base stands at the left, as the point of no training pairs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (objective, one), colour, shift in zip(found.items(), ("#c1440e", "#4878a8"), (0.985, 1.015)):
        ordered = sorted(usual(one), key=lambda point: point["pairs"])
        shares = [one["base"], *(point["arm"] for point in ordered)]
        at = [shift * count for count in (32, *(point["pairs"] for point in ordered))]
        spread = [1.96 * share["standard_error"] for share in shares]
        values = [share["accuracy"] for share in shares]
        axis.errorbar(at, values, yerr=spread, fmt="o-", color=colour, linewidth=1, capsize=3, label=objective)
    axis.axhline(0.5, color="#333333", linewidth=0.8, linestyle=":")
    ticks = sorted({32, *(point["pairs"] for one in found.values() for point in usual(one))})
    axis.set(xscale="log", xlabel="training pairs", ylabel="held-out pairs ranked right")
    labels = {group[0]: "–".join(map(str, sorted({group[0], group[-1]}))) for group in near(ticks)}
    axis.set_xticks(list(labels), ["base" if tick == 32 else label for tick, label in labels.items()])
    axis.minorticks_off()
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", choices=OBJECTIVES)
    parser.add_argument("pairs_folder", type=Path, help="folder of pairs_harmless.py or pairs_helpful.py")
    parser.add_argument("work", type=Path, help="folder for trainings, kept")
    points = "training pairs; 0: all of them; PAIRS:NAME=VALUE,... changes settings of TrainConfig"
    parser.add_argument("--pairs", type=Point.parse, nargs="+", default=[Point(128), Point(512)], help=points)
    parser.add_argument("--json", type=Path, help="result file, in which the objective's curve is replaced")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    found = before | {args.objective: curve(args.objective, args.pairs_folder, args.work, args.pairs)}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
