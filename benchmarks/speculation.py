"""Measures speculative guided decoding on a CPU in tokens/s over drafts per step, beside plain decoding and others.

    OMP_NUM_THREADS=1 python benchmarks/speculation.py pair [--base BASE] [--arm ARM]     a small ARM drafts for a base
    OMP_NUM_THREADS=1 python benchmarks/speculation.py lookup [--base BASE] [--arm LORA]  lanes; text repeats its prompt
    OMP_NUM_THREADS=1 python benchmarks/speculation.py agreement [--base BASE] [--arm ARM]

All take --json FILE; benchmarks/plot_speculation.py draws those files. benchmarks/inflated.py makes larger bases.

Contenders take turns in one process, after one unmeasured round of all. Every round has another prompt and another
seed. A time is of decoding alone: the time of all tokens less that of one. It is the process's CPU time, which with one
thread is the time on an idle machine. Figures are medians; speed-ups are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import DTYPES, naive
from result_files import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from genarm_fast import GenARM, GenerationOutput, SamplingParams, demo
from genarm_fast.cli.bench import QUESTIONS
from genarm_fast.engine.model_runner import ModelRunner
from genarm_fast.kernels import guided_sample
from genarm_fast.speculation.config import Speculation
from genarm_fast.speculation.estimates import best_k, expected_speedup

PASSAGES = [
    "The old lighthouse stands at the end of a narrow path that leads from the village to the cliffs. It was built in"
    " 1874 after three ships were lost in a single winter. Today its lamp is electric and its keeper is gone, but"
    " visitors still climb the ninety steps to look out over the bay.",
    "Bread needs only four things: flour, water, salt and time. Mix them in the evening, cover the bowl, and let the"
    " dough rest until morning. Then shape it into a loaf, wait for another hour, and bake it in a very hot oven until"
    " the crust is dark and sounds hollow when you knock on it.",
    "The committee met on Tuesday to discuss the new library. Members agreed that the reading room should face the"
    " garden, that the children's books should be on the ground floor, and that the building should open before the"
    " end of the next school year. The mayor promised to find the money.",
]
COPY = "Repeat the following text word for word, without any changes:\n\n{}"

Run = Callable[[int, int], GenerationOutput | list[GenerationOutput] | None]  # takes (round, new tokens)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class Case:
    """A base, an ARM, and the contenders over them. They share one copy of the weights, unless a LoRA is merged."""

    def __init__(self, args: argparse.Namespace) -> None:
        dtype = DTYPES[args.dtype]
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=False)
        self.base = AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype, trust_remote_code=False).eval()
        shared = {"tokenizer": self.tokenizer, "dtype": dtype, "max_batch_size": max(args.batch)}
        if args.quantization:  # the engine gets a quantized copy; Hugging Face's base keeps its weights
            self.model = GenARM.from_pretrained(args.base, str(args.arm), quantization=args.quantization, **shared)
        else:
            self.model = GenARM.from_pretrained(self.base, str(args.arm), **shared)
        # The ARM's model, for the naive loop and for Hugging Face's assisted generation.
        self.arm = None if args.quantization else self.model.arms[0].model
        texts = [COPY.format(passage) for passage in PASSAGES] if args.part == "lookup" else QUESTIONS[:6]
        self.prompts = [chat(text) for text in texts]

    def ours(self, batch: int, speculation: Any, *, guided: bool = True) -> Run:
        weights = [self.args.weight if guided else 0.0]
        params: dict[str, Any] = {"ignore_eos": True, "temperature": self.args.temperature, "weights": weights}

        def run(turn: int, tokens: int) -> list[GenerationOutput]:
            prompts = [self.prompts[(turn + i) % len(self.prompts)] for i in range(batch)]
            seeds = [1000 * turn + i for i in range(batch)]
            requests = [SamplingParams(seed=seed, max_new_tokens=tokens, **params) for seed in seeds]
            return self.model.generate(prompts, requests, speculation=speculation)

        return run

    def ids(self, turn: int, batch: int) -> Tensor:
        prompt = self.prompts[turn % len(self.prompts)]
        text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]] * batch)

    def hugging_face(self, batch: int, **options: Any) -> Run:
        def run(turn: int, tokens: int) -> None:
            ids = self.ids(turn, batch)
            torch.manual_seed(turn)
            limits = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
            sampling = {"do_sample": True, "top_k": 0, "temperature": self.args.temperature}
            self.base.generate(ids, attention_mask=torch.ones_like(ids), **limits, **sampling, **options)

        return run

    def two_models(self, batch: int) -> Run:
        return lambda turn, tokens: naive([self.base, self.arm], [1.0, self.args.weight], self.ids(turn, batch), tokens)

    def contenders(self, batch: int) -> dict[str, Run]:
        drafter = "ngram" if self.args.part == "lookup" else self.model.arm_names[0]
        runs = {
            "base alone, Hugging Face": self.hugging_face(batch),
            "base alone": self.ours(batch, "off", guided=False),
            "K = 0": self.ours(batch, "off"),
        }
        if self.arm is not None:
            runs["naive loop over two models"] = self.two_models(batch)
        if batch == 1 and self.args.part == "lookup":
            runs["base alone, Hugging Face prompt lookup"] = self.hugging_face(1, prompt_lookup_num_tokens=4)
        elif batch == 1 and self.arm is not None:
            runs["base alone, Hugging Face assisted"] = self.hugging_face(1, assistant_model=self.arm)
        runs |= {f"K = {k}": self.ours(batch, Speculation(drafter, k)) for k in self.args.k}
        runs |= {"auto": self.ours(batch, "auto")}
        return {name: run for name, run in runs.items() if name not in self.args.skip}

    def forward_seconds(self, member: int, tokens: int, calls: int = 7) -> float:
        """Return the median CPU seconds of a member's forward over `tokens` tokens after 64 tokens of context."""
        runner = ModelRunner([self.model.members[member]])
        runner.refresh()
        runner.discover(1, 128)
        ids, positions = torch.full((1, 1, tokens), 100), torch.arange(64, 64 + tokens).view(1, 1, -1)
        seconds = []
        for _ in range(calls + 2):
            start = time.process_time()
            with torch.inference_mode():
                runner.forward(ids, positions, [0], 64 + tokens, [0])
            seconds.append(time.process_time() - start)
        return statistics.median(seconds[2:])


def timed(run: Run, turn: int, tokens: int) -> tuple[float, Any]:
    start = time.process_time()
    outputs = run(turn, tokens)
    return time.process_time() - start, outputs


def measure(case: Case, batch: int) -> list[dict[str, Any]]:
    """Return a result line for each contender at this batch size."""
    args = case.args
    runs = case.contenders(batch)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outputs: dict[str, list[GenerationOutput]] = {name: [] for name in runs}
    for turn in range(args.rounds + 1):
        prefill: dict[str, float] = {}
        for name, run in runs.items():
            # All guided runs of the engine do the same for a prompt, so one of them measures it for all.
            kind = "ours" if name.startswith("K =") or name == "auto" else name
            if kind not in prefill:
                prefill[kind] = timed(run, turn, 1)[0]
            spent, found = timed(run, turn, args.tokens)
            if turn:
                seconds[name].append(spent - prefill[kind])
                outputs[name] += found or []
    plain = [output.token_ids for output in outputs["K = 0"]]
    lines = []
    for name in runs:
        line: dict[str, Any] = {"batch": batch, "contender": name}
        line["tokens/s"] = batch * (args.tokens - 1) / statistics.median(seconds[name])
        for other in (each for each in ("base alone, Hugging Face", "K = 0") if each in runs):
            line[f"x {other}"] = statistics.median(o / s for o, s in zip(seconds[other], seconds[name]))
        if outputs[name] and name != "base alone":
            rounds = [output.rounds for output in outputs[name]]
            drafted = sum(each.drafted for each in rounds)
            line["acceptance"] = sum(each.accepted for each in rounds) / drafted if drafted else None
            line["tokens/step"] = len(rounds) * args.tokens / sum(each.rounds for each in rounds)
            line["same text"] = sum(o.token_ids == p for o, p in zip(outputs[name], plain)) / len(plain)
        lines.append(line)
    return lines


def predict(case: Case, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the speed-ups that an analytical model predicts for one row, or {} where it does not apply.

    Its inputs are the times of single forwards and the acceptance at K = 1."""
    first = [line["acceptance"] for line in lines if line["batch"] == 1 and line["contender"] == "K = 1"]
    if not first or first[0] is None or case.args.part == "lookup":
        return {}
    base, arm = case.forward_seconds(0, 1), case.forward_seconds(1, 1)
    cost, acceptance, ks = arm / base, first[0], [0, *case.args.k]
    verify = {k: case.forward_seconds(0, k + 1) / base for k in ks}
    return {
        "base forward, ms": 1e3 * base,
        "arm forward, ms": 1e3 * arm,
        "cost": cost,
        "acceptance": acceptance,
        "verify": verify,
        "free verification": {k: expected_speedup(cost, acceptance, k) for k in ks},
        "measured verification": {k: expected_speedup(cost, acceptance, k, verify=verify[k]) for k in ks},
        "best k": best_k(cost, acceptance, 16),
    }


@torch.inference_mode()
def agreement(case: Case) -> list[dict[str, Any]]:
    """Return how often drafter and target draw the same token with the same noise, on guided text, beside Σ min(p, q).

    Σ min(p, q) is the best acceptance that any method can reach."""
    lines = []
    for weight in case.args.weights:
        case.args.weight = weight
        found: dict[str, list[Tensor]] = {}
        outputs = [o for turn in range(case.args.rounds) for o in case.ours(1, "off")(turn, case.args.tokens) or []]
        for output in outputs:
            ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids]])
            where = slice(len(output.prompt_token_ids) - 1, -1)
            base, arm = (m(input_ids=ids).logits[0, where].float().contiguous() for m in (case.base, case.arm))
            rows = torch.arange(len(base))
            target = base + weight * arm
            for name, power in (("tempered", 1 + weight), ("untempered", 1.0)):
                draws = [
                    guided_sample(s, (), (), temperature=case.args.temperature, seeds=rows + 7, positions=rows).tokens
                    for s in (target, power * arm)
                ]
                found.setdefault(f"{name}, same noise", []).append((draws[0] == draws[1]).float())
                p, q = (s.div(case.args.temperature).softmax(-1) for s in (target, power * arm))
                found.setdefault(f"{name}, Σ min(p, q)", []).append(torch.minimum(p, q).sum(-1))
        lines.append({"weight": weight} | {name: torch.cat(values).mean().item() for name, values in found.items()})
    return lines


def show(lines: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    names = list(dict.fromkeys(name for line in lines for name in line))
    for name in names:
        table.add_column(name, justify="right" if name != "contender" else "left")
    for line in lines:
        cells = [line.get(name) for name in names]
        table.add_row(*("" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["pair", "lookup", "agreement"])
    parser.add_argument("--base", type=Path, help="default: the demo's")
    parser.add_argument("--arm", type=Path, help="default: the demo's small one; its positive LoRA for lookup")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="for agreement")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--quantization", choices=["exact", "int8", "int4"], help="of our base and ARM (default: none)")
    parser.add_argument("--skip", nargs="+", default=[], metavar="CONTENDER", help="leave these out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.base = args.base or demo.base()
    args.arm = args.arm or demo.arm("positive" if args.part == "lookup" else "small")

    case = Case(args)
    about = {
        "part": args.part,
        "base": args.base.name,
        "arm": args.arm.name,
        "parameters": case.base.num_parameters(),
        "weight": args.weight,
        "temperature": args.temperature,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "tokens": args.tokens,
        "rounds": args.rounds,
    }
    about |= machine()
    result: dict[str, Any] = {"about": about}
    if args.part == "agreement":
        result["lines"] = agreement(case)
    else:
        result["lines"] = [line for batch in args.batch for line in measure(case, batch)]
        result["model"] = predict(case, result["lines"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    show(result["lines"], ", ".join(f"{name} {value}" for name, value in about.items()))
    if result.get("model"):
        print(json.dumps(result["model"], indent=1))


if __name__ == "__main__":
    main()
