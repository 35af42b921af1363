"""The methods of the quality tables, each a function from prompts to responses, over one set of loaded models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

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
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from small_arms import name_of, row_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from genarm_fast import ARM, GenARM, demo

Method = Callable[[Sequence[Sequence[int]], Params], list[Response]]
OBJECTIVES = ("positive", "concise")
TRAINED = "trained for the point"
ARMS = (*OBJECTIVES, "small")  # shipped ARMs that take part
# Trained by trajectory_reward.py on 240 pairs of the ARM `positive`, from the base's first 10 layers.
REWARD = Path(__file__).parent / "baselines" / "positive_reward"


@dataclass(frozen=True, kw_only=True)
class Size:
    """The amount of work of a comparison.

    best_of: values of N. args_weights: values of w for ARGS. k: candidates of ARGS. dear_prompts: how many prompts
    best-of-N and ARGS get. transfer_k, rollout, transfer_prompts: k, rollout tokens and prompts of Transfer-Q, which is
    by far the slowest. points: number of points of a front.
    """

    prompts: int
    tokens: int
    seeds: int
    dear_prompts: int
    best_of: tuple[int, ...]
    args_weights: tuple[float, ...]
    k: int
    transfer_k: int
    rollout: int
    transfer_prompts: int
    front_prompts: int
    points: int


SIZES = {
    "full": Size(
        prompts=64, tokens=48, seeds=3, dear_prompts=64, best_of=(2, 16), args_weights=(1.0, 3.0, 10.0), k=10,
        transfer_k=10, rollout=20, transfer_prompts=64, front_prompts=32, points=11,
    ),
    "short": Size(
        prompts=64, tokens=24, seeds=1, dear_prompts=24, best_of=(2, 16), args_weights=(3.0, 10.0), k=10,
        transfer_k=5, rollout=5, transfer_prompts=8, front_prompts=24, points=11,
    ),
    "quick": Size(
        prompts=8, tokens=16, seeds=1, dear_prompts=8, best_of=(4,), args_weights=(10.0,), k=4,
        transfer_k=4, rollout=2, transfer_prompts=4, front_prompts=4, points=5,
    ),
}  # fmt: skip


class Models:
    """The models that the methods run, in float32. Each is loaded when it is first used.

    policies: folders of DPO adapters by objective. An objective without one uses its ARM as its policy, which is what
    DPO without a reference gives. reward: folder of the trajectory reward model; None leaves out the methods that need
    it. rewarded: folder of baselines/rewarded.py's adapter; None leaves that method out. small: folders of ARMs with
    other sizes than the `small` that ships. points: folders of baselines/per_point.py's adapters by share.

    Raises:
        ValueError: a folder of `small` has no distilled ARM, or two of its ARMs have the same number of parameters.
    """

    def __init__(
        self,
        policies: dict[str, Path],
        reward: Path | None,
        rewarded: Path | None = None,
        small: Sequence[Path] = (),
        points: Mapping[float, Path] | None = None,
    ) -> None:
        self.folder = demo.base()
        self.policies = {name: policies.get(name, demo.arm(name)) for name in OBJECTIVES}
        self.trained_policies = sorted(policies)
        self.reward_folder, self.rewarded_folder = reward, rewarded
        self.points = dict(points or {})
        self.small = {name_of(folder): folder for folder in small}
        if len(self.small) < len(small):
            raise ValueError(f"small={[str(folder) for folder in small]}: expected ARMs of different sizes")

    def inputs(self) -> dict[str, str | None]:
        """Return a hash of the weights of each model that responses depend on, by its name; None without a model."""

        def digest(folder: Path | None) -> str | None:
            if folder is None:
                return None
            weights = b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
            if not weights:
                raise SystemExit(f"{folder}: expected weights in *.safetensors, found none")
            return hashlib.sha256(weights).hexdigest()[:16]

        folders = {"reward": self.reward_folder, **self.policies}
        folders |= {f"ARM {name}": demo.arm(name) for name in ARMS} | self.small
        folders |= {point_name(TRAINED, share): folder for share, folder in self.points.items()}
        if self.rewarded_folder:
            folders["rewarded"] = self.rewarded_folder
        return {name: digest(folder) for name, folder in folders.items()}

    @cached_property
    def engine(self) -> GenARM:
        arms = [ARM(demo.arm(name), name=name) for name in ARMS]
        arms += [ARM(folder, name=name) for name, folder in self.small.items()]
        return GenARM.from_pretrained(self.folder, arms, dtype=torch.float32, max_batch_size=64)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

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
    def _adapted(self) -> PeftModel:
        bare = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, trust_remote_code=False)
        return PeftModel.from_pretrained(bare, str(self.policies[OBJECTIVES[0]])).eval()

    def souped(self, adapter: Path) -> Member:
        """Return a policy with this adapter, which must have the shape of the first objective's policy.

        All soups share one model, so the policy is valid until the next call."""
        set_peft_model_state_dict(self._adapted, load_file(adapter / "adapter_model.safetensors"))
        return Member("policy", self._adapted)

    @cached_property
    def arm_alone(self) -> Member:
        return self.policy(demo.arm(OBJECTIVES[0]), "ARM")

    @cached_property
    def objectives(self) -> list[Member]:
        return [self.first_objective, *(self.policy(self.policies[name], name) for name in OBJECTIVES[1:])]

    @cached_property
    def first_objective(self) -> Member:
        """The policy of the first objective, for tables with one objective: these do not load the other policies."""
        return self.policy(self.policies[OBJECTIVES[0]], OBJECTIVES[0])


@dataclass(frozen=True)
class FirstPrompts:
    """A method that is too slow for all prompts and runs on the first ones only."""

    run: Method
    prompts: int

    def __call__(self, prompts: Sequence[Sequence[int]], params: Params) -> list[Response]:
        return self.run(prompts[: self.prompts], params)


def by_arms(models: Models, temperature: float = 1.0, **weights: float) -> Method:
    """Return the method that runs the engine with these ARMs' weights. Without weights it runs the base alone."""

    def run(prompts: Sequence[Sequence[int]], params: Params) -> list[Response]:
        all_weights = dict.fromkeys(models.engine.arm_names, 0.0) | weights
        return guided(models.engine, all_weights, prompts, replace(params, temperature=temperature))

    return run


def general(models: Models, size: Size) -> dict[str, Method]:
    """Return the methods of the table `general`: alignment to one objective, `positive`."""
    methods = {
        "base": by_arms(models),
        "control, w = 1": by_arms(models, 1 / 2),  # the base in place of its own ARM: see baselines/sharpening.py
        "control, w = 2": by_arms(models, 1 / 3),
        **{f"guided, w = {w:g}": by_arms(models, positive=w) for w in (0.5, 1.0, 2.0)},
        "the ARM alone": lambda prompts, params: mixture([models.arm_alone], [1.0], prompts, params),
        "policy": lambda prompts, params: mixture([models.first_objective], [1.0], prompts, params),
    }
    if rewarded := models.rewarded_folder:
        methods["rewarded fine-tune"] = lambda prompts, params: mixture(
            [models.policy(rewarded, "rewarded")], [1.0], prompts, params
        )
    if models.reward_folder is None:
        return methods

    for n in size.best_of:
        methods[f"best of {n}"] = FirstPrompts(
            lambda prompts, params, n=n: best_of_n(by_arms(models), models.reward, n, prompts, params),
            size.dear_prompts,
        )

    def searched(weight: float, temperature: float) -> Method:
        def run(prompts: Sequence[Sequence[int]], params: Params) -> list[Response]:
            given = models.base, reward_member("reward", models.reward), prompts
            return args_search(*given, replace(params, temperature=temperature), weight=weight, k=size.k)

        return run

    def transferred(prompts: Sequence[Sequence[int]], params: Params) -> list[Response]:
        given = models.base, models.first_objective, reward_member("reward", models.reward), prompts, params
        return transfer_q(*given, weight=strongest, k=size.transfer_k, rollout=size.rollout)

    for w in size.args_weights:
        methods[f"ARGS, sampling, w = {w:g}"] = FirstPrompts(searched(w, 1.0), size.dear_prompts)
    strongest = size.args_weights[-1]
    methods[f"ARGS, greedy, w = {strongest:g}"] = FirstPrompts(searched(strongest, 0.0), size.dear_prompts)
    methods[f"Transfer-Q, w = {strongest:g}"] = FirstPrompts(transferred, size.transfer_prompts)
    return methods


def weak(models: Models) -> dict[str, Method]:
    """Return the methods of the table `weak`: small ARMs on the base, with an ARM and a policy of the base's size."""
    return {
        "base": by_arms(models),
        "control, w = 1": by_arms(models, 1 / 2),
        "small ARM, w = 1": by_arms(models, small=1.0),
        "small ARM, w = 2": by_arms(models, small=2.0),
        **{row_of(name): by_arms(models, **{name: 1.0}) for name in models.small},
        "guided, w = 1": by_arms(models, positive=1.0),
        "policy": lambda prompts, params: mixture([models.first_objective], [1.0], prompts, params),
    }


def shares(points: int) -> list[float]:
    """Return the first objective's share at each point of a front, evenly spaced from 0 to 1."""
    return [i / (points - 1) for i in range(points)]


def point_name(method: str, share: float) -> str:
    return f"{method} {share:.2f}"


def fronts(models: Models, points: int) -> dict[str, Method]:
    """Return the methods of the table `front`, for every share of the first of two objectives; names end in the share.

    They are guidance with weights that sum to 1 and to 2, MOD and soups, and policies trained for single points."""

    def souped(a: float) -> Method:
        def run(prompts: Sequence[Sequence[int]], params: Params) -> list[Response]:
            with TemporaryDirectory() as folder:
                soup([models.policies[name] for name in OBJECTIVES], [a, 1 - a], Path(folder))
                return mixture([models.souped(Path(folder))], [1.0], prompts, params)

        return run

    def mixed(a: float) -> Method:
        return lambda prompts, params: mod(models.objectives, [a, 1 - a], prompts, params)

    kinds = {
        "guided, sum 1": lambda a: by_arms(models, positive=a, concise=1 - a),
        "guided, sum 2": lambda a: by_arms(models, positive=2 * a, concise=2 * (1 - a)),
        "MOD": mixed,
        "soup": souped,
    }
    found = {point_name(name, a): make(a) for name, make in kinds.items() for a in shares(points)}
    for a, folder in models.points.items():
        found[point_name(TRAINED, a)] = lambda prompts, params, folder=folder: mixture(
            [models.souped(folder)], [1.0], prompts, params
        )
    return found
