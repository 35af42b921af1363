"""Every method of the quality tables as a function from prompts to responses, over one set of loaded models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from baselines.args import args as args_search
from baselines.best_of_n import best_of_n
from baselines.guided import guided
from baselines.interface import Member, Params, Response, reward_member
from baselines.mixture import mixture
from baselines.mod import mod
from baselines.soups import soup
from baselines.trajectory_reward import TrajectoryReward
from baselines.transfer_q import transfer_q
from peft import PeftModel
from transformers import AutoModelForCausalLM

from genarm_fast import ARM, GenARM, demo

Method = Callable[[Sequence[Sequence[int]], Params], list[Response]]
OBJECTIVES = ("positive", "concise")


@dataclass(frozen=True)
class Size:
    """How much is run. args_weights: the sweep of w; best_of: the values of N."""

    prompts: int
    tokens: int
    seeds: int
    best_of: tuple[int, ...]
    args_weights: tuple[float, ...]
    k: int
    rollout: int
    front_prompts: int


FULL = Size(64, 48, 3, (2, 16), (1.0, 3.0, 10.0), 10, 20, 32)
QUICK = Size(16, 24, 1, (2, 4), (3.0, 10.0), 5, 2, 6)


class Models:
    """What the methods run; loaded when first asked for. float32.

    policies: folders of DPO adapters by objective; an objective without one takes its ARM as its policy, which is what
    DPO without a reference gives. reward: folder of the trajectory reward model, or None: methods that ask one are out.
    """

    def __init__(self, policies: dict[str, Path], reward: Path | None) -> None:
        self.folder = demo.base()
        self.policies = {name: policies.get(name, demo.arm(name)) for name in OBJECTIVES}
        self.trained_policies = sorted(policies)
        self.reward_folder = reward

    @cached_property
    def engine(self) -> GenARM:
        arms = [ARM(demo.arm(name), name=name) for name in (*OBJECTIVES, "small")]
        return GenARM.from_pretrained(self.folder, arms, dtype=torch.float32, max_batch_size=64)

    @cached_property
    def base(self) -> Member:
        return Member("base", self.engine.base.model)

    @cached_property
    def reward(self) -> TrajectoryReward:
        return TrajectoryReward.from_pretrained(self.folder, self.reward_folder)  # type: ignore[arg-type]

    def policy(self, adapter: Path, name: str = "policy") -> Member:
        bare = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, trust_remote_code=False)
        return Member(name, PeftModel.from_pretrained(bare, str(adapter)).merge_and_unload().eval())

    @cached_property
    def objectives(self) -> list[Member]:
        return [self.policy(self.policies[name], name) for name in OBJECTIVES]


def by_arms(models: Models, temperature: float = 1.0, **weights: float) -> Method:
    """The engine with these ARMs; none of them is the base."""
    all_weights = dict.fromkeys((*OBJECTIVES, "small"), 0.0) | weights

    def run(prompts: Sequence[Sequence[int]], params: Params) -> list[Response]:
        return guided(models.engine, all_weights, prompts, replace(params, temperature=temperature))

    return run


def general(models: Models, size: Size) -> dict[str, Method]:
    """Alignment to one objective, `positive`."""
    methods = {
        "base": by_arms(models),
        "control, w = 1": by_arms(models, 1 / 2),  # the base as its own ARM: see baselines/sharpening.py
        "control, w = 2": by_arms(models, 1 / 3),
        **{f"guided, w = {w:g}": by_arms(models, positive=w) for w in (0.5, 1.0, 2.0)},
        "policy": lambda prompts, params: mixture(models.objectives[:1], [1.0], prompts, params),
    }
    if models.reward_folder is None:
        return methods

    def rewarded(method: Any, **options: Any) -> Method:
        def run(prompts: Sequence[Sequence[int]], params: Params) -> list[Response]:
            member = reward_member("reward", models.reward)
            given = [models.base, *([models.objectives[0]] if method is transfer_q else []), member]
            greedy = replace(params, temperature=0.0 if options.get("greedy") else 1.0)
            rest = {name: value for name, value in options.items() if name != "greedy"}
            return method(*given, prompts, greedy, k=size.k, **rest)

        return run

    for n in size.best_of:
        methods[f"best of {n}"] = lambda prompts, params, n=n: best_of_n(models.base, models.reward, n, prompts, params)
    for w in size.args_weights:
        methods[f"ARGS, sampling, w = {w:g}"] = rewarded(args_search, weight=w)
    methods[f"ARGS, greedy, w = {size.args_weights[-1]:g}"] = rewarded(
        args_search, weight=size.args_weights[-1], greedy=True
    )
    methods[f"Transfer-Q, w = {size.args_weights[-1]:g}"] = rewarded(
        transfer_q, weight=size.args_weights[-1], rollout=size.rollout
    )
    return methods


def weak(models: Models) -> dict[str, Method]:
    """The 10 M ARM on the base, between the base and a policy of the base's own size."""
    return {
        "base": by_arms(models),
        "control, w = 1": by_arms(models, 1 / 2),
        "small ARM, w = 1": by_arms(models, small=1.0),
        "small ARM, w = 2": by_arms(models, small=2.0),
        "same-size ARM, w = 1": by_arms(models, positive=1.0),
        "policy": lambda prompts, params: mixture(models.objectives[:1], [1.0], prompts, params),
    }


def fronts(models: Models, points: Sequence[float]) -> dict[str, Method]:
    """Two objectives at each share a of the first: guided, MOD, and soups. Names end in the share."""

    def souped(a: float) -> Method:
        def run(prompts: Sequence[Sequence[int]], params: Params) -> list[Response]:
            with TemporaryDirectory() as folder:
                soup([models.policies[name] for name in OBJECTIVES], [a, 1 - a], Path(folder))
                return mixture([models.policy(Path(folder))], [1.0], prompts, params)

        return run

    def mixed(a: float) -> Method:
        return lambda prompts, params: mod(models.objectives, [a, 1 - a], prompts, params)

    return {
        **{f"guided {a:.1f}": by_arms(models, positive=a, concise=1 - a) for a in points},
        **{f"MOD {a:.1f}": mixed(a) for a in points},
        **{f"soup {a:.1f}": souped(a) for a in points},
    }
