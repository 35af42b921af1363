"""Measures how well a small model predicts the base: KL, top-1 agreement and acceptance bounds on held-out prompts.

Σ_x min(p(x), q(x)) is the best possible probability that a token drafted from q is accepted as a token of p. In guided
decoding with the small model as an ARM of weight w, p ∝ base · small^w. The drafter is the small model alone, tempered
by 1 + w: q ∝ small^(1 + w).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

WEIGHTS = (0.5, 1.0, 2.0)
ROW_ARRAYS = ("tokens", "top_ids", "top_logprobs", "tail_ids")


def load_responses(folder: Path, names: Iterable[str] | None = None) -> list[dict[str, np.ndarray]]:
    """Return the responses in teacher_data.py's shards, each a dict of arrays. names: shards to read; default: all."""
    paths = sorted(folder.glob("*.npz")) if names is None else [folder / name for name in names]
    if not paths:
        raise ValueError(f"folder={str(folder)!r}: expected shards of teacher_data.py (*.npz), found none")
    responses = []
    for path in paths:
        with np.load(path) as file:
            shard = dict(file)
        ends, prompt_ends = np.cumsum(shard["lengths"])[:-1], np.cumsum(shard["prompt_lengths"])[:-1]
        columns = {key: np.split(shard[key], ends) for key in ROW_ARRAYS}
        columns["prompt_tokens"] = np.split(shard["prompt_tokens"], prompt_ends)
        columns["temperature"] = shard["temperature"]
        responses += [dict(zip(columns, row)) for row in zip(*columns.values())]
    return responses


@torch.inference_mode()
def response_logprobs(model: PreTrainedModel, response: dict[str, np.ndarray]) -> Tensor:
    """Return log p(· | prefix) at each position of a response, float32 [N, V]."""
    text = np.concatenate([response["prompt_tokens"], response["tokens"][:-1]]).astype(np.int64)
    ids = torch.from_numpy(text)[None]
    return (
        model(input_ids=ids, use_cache=False, logits_to_keep=len(response["tokens"])).logits[0].float().log_softmax(-1)
    )


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """Return Σ_x min(p(x), q(x)), [N], of two log-distributions [N, V]."""
    return torch.minimum(p, q).exp().sum(-1)


class Agreement:
    """A comparison of models with the base at the positions of some responses. Holds the base's log-probs, float16."""

    def __init__(self, base: PreTrainedModel, responses: list[dict[str, np.ndarray]]):
        self.responses = responses
        self.base = [response_logprobs(base, r).half() for r in responses]

    @torch.inference_mode()
    def plain(self, model: PreTrainedModel) -> dict[str, float]:
        """Return means over positions: kl (base || model, nats), top1 (share of equal argmax), overlap: Σ min(p, q)."""
        rows = []
        for response, kept in zip(self.responses, self.base):
            p, q = kept.float(), response_logprobs(model, response)
            kl = (p.exp() * (p - q)).sum(-1)
            rows.append(torch.stack([kl, (p.argmax(-1) == q.argmax(-1)).float(), overlap(p, q)], -1))
        kl_, top1, both = torch.cat(rows).mean(0).tolist()
        return {"kl": kl_, "top1": top1, "overlap": both}

    @torch.inference_mode()
    def guided(self, model: PreTrainedModel) -> dict[str, float]:
        """Return Σ min(p, q) for each weight w, where p ∝ base · model^w at T = 1.

        "tempered" has q ∝ model^(1 + w); "untempered" has q ∝ model, for comparison."""
        rows = []
        for response, kept in zip(self.responses, self.base):
            base, small = kept.float(), response_logprobs(model, response)
            cells = []
            for w in WEIGHTS:
                p = (base + w * small).log_softmax(-1)
                cells += [overlap(p, ((1 + w) * small).log_softmax(-1)), overlap(p, small)]
            rows.append(torch.stack(cells, -1))
        means = torch.cat(rows).mean(0).tolist()
        names = [f"w={w:g}, {drafter}" for w in WEIGHTS for drafter in ("tempered", "untempered")]
        return dict(zip(names, means))

    @torch.inference_mode()
    def drift(self, before: PreTrainedModel, after: PreTrainedModel) -> float:
        """Return KL(before || after) in nats per token, the mean over positions."""
        total, positions = 0.0, 0
        for response in self.responses:
            p, q = response_logprobs(before, response), response_logprobs(after, response)
            total += (p.exp() * (p - q)).sum().item()
            positions += len(p)
        return total / positions


@torch.inference_mode()
def decode_cost(base: PreTrainedModel, model: PreTrainedModel, steps: int = 60, context: int = 64) -> dict[str, float]:
    """Return the median ms of a batch-1 decode step of both models. Steps alternate, so both see the same machine."""
    ids = torch.randint(0, base.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    caches, seconds = (DynamicCache(), DynamicCache()), ([], [])
    for member, cache in zip((base, model), caches):
        member(input_ids=ids, past_key_values=cache)
    for _ in range(steps):
        for member, cache, times in zip((base, model), caches, seconds):
            start = time.process_time()  # with one thread, CPU time does not grow on a busy machine
            member(input_ids=ids[:, :1], past_key_values=cache)
            times.append(time.process_time() - start)
    t_base, t_model = map(statistics.median, seconds)
    return {"base_ms": 1e3 * t_base, "model_ms": 1e3 * t_model, "ratio": t_model / t_base}


def measure(model: Path, base: Path | str, held_out: Path, before: Path | None = None) -> dict[str, Any]:
    """Return all measures of a model's folder, separately for each temperature at which held-out text was sampled.

    before: folder of the model before preference training; if it is given, KL(before || model) is reported as `drift`.
    """

    def load(folder: Path | str, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()

    responses, small = load_responses(held_out), load(model, torch.float32)
    report: dict[str, Any] = {"responses": len(responses), "positions": sum(len(r["tokens"]) for r in responses)}
    for temperature in sorted({float(r["temperature"]) for r in responses}, reverse=True):
        chosen = [r for r in responses if float(r["temperature"]) == temperature]
        agreement = Agreement(load(base, torch.float32), chosen)
        cells: dict[str, Any] = {**agreement.plain(small), "guided": agreement.guided(small)}
        if before is not None:
            cells["drift"] = agreement.drift(load(before, torch.float32), small)
        report[f"text sampled at T={temperature:.1f}"] = cells
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the small model")
    parser.add_argument("--held-out", type=Path, help="folder of teacher_data.py --held-out; without it, only the cost")
    parser.add_argument("--before", type=Path, help="the model before preference training: report the drift from it")
    parser.add_argument("--base", help="model folder or hub id; default: the demo's base")
    args = parser.parse_args()
    if args.base is None:
        from genarm_fast.demo import base

        args.base = base()
    report = measure(args.model, args.base, args.held_out, args.before) if args.held_out else {}
    torch.set_num_threads(1)
    members = [
        AutoModelForCausalLM.from_pretrained(m, dtype=torch.bfloat16, trust_remote_code=False).eval()
        for m in (args.base, args.model)
    ]
    print(json.dumps({**report, "decode, bfloat16, one thread": decode_cost(*members)}, indent=1))


if __name__ == "__main__":
    main()
