"""Metrics of an ARM on held-out pairs, length bias included."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_losses(logps: Tensor, beta: float, margins: Tensor | float = 0.0) -> Tensor:
    """Return −log σ(β_r Σ log π(y_w) − β_r Σ log π(y_l) − margin) for N pairs (arXiv 2410.08193; margins as in TRL).

    logps: [2N], Σ log π over the tokens of each response, EOS included, the chosen ones first. margins: [N].
    """
    chosen, rejected = logps.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected) - margins)


@dataclass
class PairStats:
    """Collects rewards and lengths of pairs, then summarises them. Rewards are Σ log π in nats, without β_r."""

    beta: float
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    chosen_tokens: list[int] = field(default_factory=list)
    rejected_tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def add(self, logps: Tensor, tokens: Tensor, margins: Tensor) -> None:
        """Add N pairs. logps, tokens: [2N], chosen first. margins: [N], the margins that the loss requires."""
        half = len(logps) // 2
        self.chosen += logps[:half].tolist()
        self.rejected += logps[half:].tolist()
        self.chosen_tokens += tokens[:half].tolist()
        self.rejected_tokens += tokens[half:].tolist()
        self.margins += margins.tolist()

    def rows(self) -> list[tuple[float, ...]]:
        """Return the numbers of each pair, from which `of_rows` makes the same statistics again."""
        margins = self.margins or [0.0] * len(self.chosen)
        return list(zip(self.chosen, self.rejected, self.chosen_tokens, self.rejected_tokens, margins))

    @classmethod
    def of_rows(cls, beta: float, rows: list[tuple[float, ...]]) -> PairStats:
        return cls(beta, *(list(column) for column in zip(*rows)))

    def summary(self) -> dict[str, float]:
        """Return the metrics. Accuracy counts ties as half. `length_*` tell how much of it length explains."""
        n = len(self.chosen)
        if not n:
            return {}
        chosen, rejected = torch.tensor([self.chosen, self.rejected], dtype=torch.float64)
        margin = chosen - rejected
        tokens_chosen, tokens_rejected = torch.tensor([self.chosen_tokens, self.rejected_tokens], dtype=torch.float64)
        longer = tokens_chosen - tokens_rejected
        required = torch.tensor(self.margins or [0.0], dtype=torch.float64)
        accuracy = _wins(margin)
        result = {
            "pairs": n,
            "loss": float(-F.logsigmoid(self.beta * margin - required).mean()),
            "accuracy": accuracy,
            "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / n),
            "margin_mean": float(margin.mean()),
            "margin_std": float(margin.std(correction=0)),
            "reward_chosen": float(chosen.mean()),
            "reward_rejected": float(rejected.mean()),
            "tokens_chosen": float(tokens_chosen.mean()),
            "tokens_rejected": float(tokens_rejected.mean()),
            "length_baseline_accuracy": _wins(-longer),
            "length_margin_correlation": _correlation(margin, longer),
        }
        for name, mask in (("chosen_longer", longer > 0), ("chosen_shorter", longer < 0)):
            if mask.any():
                result[f"accuracy_{name}"] = _wins(margin[mask])
        return result


def _wins(margin: Tensor) -> float:
    return float(((margin > 0).double() + 0.5 * (margin == 0).double()).mean())


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else 0.0
