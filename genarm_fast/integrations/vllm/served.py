"""The description of the ARMs that vLLM's processes get: plain values in the model's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ARCHITECTURE = "GenARMForCausalLM"
VERSIONS = ((0, 32), (0, 34))  # the first supported version, the first unsupported one


@dataclass(frozen=True)
class ServedARM:
    """An ARM as a server knows it. lane: whether it is a LoRA adapter of the base that runs in the base's forward."""

    name: str
    model: str
    weight: float = 1.0
    lane: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Served:
    """All that the configuration says of a guided model.

    weight_range: the lowest and the highest weight that a request may ask for; None for any weight. vocab_size: number
    of token ids that all members share; None until the frontend has compared their tokenizers.
    """

    arms: tuple[ServedARM, ...]
    weight_range: tuple[float, float] | None = None
    vocab_size: int | None = None

    @property
    def names(self) -> list[str]:
        return [arm.name for arm in self.arms]

    @property
    def defaults(self) -> list[float]:
        return [arm.weight for arm in self.arms]

    def overrides(self) -> dict[str, Any]:
        """Return fields for the model's configuration, in JSON's types."""
        arms = [asdict(arm) for arm in self.arms]
        limits = None if self.weight_range is None else list(self.weight_range)
        return {"genarm_arms": arms, "genarm_weight_range": limits, "genarm_vocab_size": self.vocab_size}

    @classmethod
    def of(cls, config: Any) -> Served:
        """Read the description from a model's configuration, or from a mapping as `overrides` makes it.

        Raises:
            ValueError: a configuration without ARMs, or with a description that `overrides` never makes.
        """
        get = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
        arms, limits = get("genarm_arms"), get("genarm_weight_range")
        if not isinstance(arms, Sequence) or not arms:
            raise ValueError(f"genarm_arms={arms!r}: expected a list of ARMs, as engine_args makes it")
        try:
            served = tuple(ServedARM(**arm) for arm in arms)
        except TypeError as error:
            raise ValueError(f"genarm_arms={arms!r}: expected ARMs as engine_args describes them: {error}") from None
        return cls(served, None if limits is None else (float(limits[0]), float(limits[1])), get("genarm_vocab_size"))


def check_version(version: str) -> None:
    """Raises RuntimeError for an unsupported version of vLLM, whose internals change with each minor version."""
    parts = version.split(".")
    found = tuple(int(part) for part in parts[:2]) if len(parts) > 1 and all(p.isdigit() for p in parts[:2]) else ()
    low, high = VERSIONS
    if not low <= found < high:
        expected = f"at least {low[0]}.{low[1]} and below {high[0]}.{high[1]}"
        raise RuntimeError(f"vLLM {version}: expected {expected}, the versions that genarm_fast plugs into")
