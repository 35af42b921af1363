"""Which LoRA adapters can be lanes of the base's forward, and whether they belong to this base."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from genarm_fast.models.adapter import INITS_KEEPING_BASE, checked_config, plain
from genarm_fast.models.checkpoint_fingerprint import checkpoint_fingerprint
from genarm_fast.models.files import read_object
from genarm_fast.models.hub import Source

# Settings that models.adapter allows and a lane does not: they need more than W x + s B A x with one s and one rank.
UNSUPPORTED: dict[str, Any] = {
    "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False,
    "fan_in_fan_out": False, "trainable_token_indices": None, "target_parameters": None, "bias": "none",
}  # fmt: skip


def adapted_model(role: str, source: Source) -> str | None:
    """Return the base that an adapter's folder or repository names; None if there is no adapter."""
    config = read_object(role, source, "adapter_config.json")
    return str(config.get("base_model_name_or_path") or "") if config else None


def check_lane(what: str, folder: str) -> None:
    """Raises ValueError for an adapter that does more than add s B A x to linears."""
    config = checked_config(what, folder)
    hint = "; merge it into a copy of its base (PEFT's merge_and_unload) and serve that as the ARM"
    if (kind := plain(config.peft_type)) != "LORA":
        raise ValueError(f"{what}: peft_type={kind!r}: expected LORA{hint}")
    for name, off in UNSUPPORTED.items():
        if (value := getattr(config, name)) and value != off:
            raise ValueError(f"{what}: {name}={value!r:.60}: expected plain LoRA without it{hint}")
    if (how := config.init_lora_weights) not in INITS_KEEPING_BASE:
        raise ValueError(f"{what}: init_lora_weights={how!r}: it rewrites its base{hint}")
    if not Path(folder, "adapter_model.safetensors").is_file():
        raise ValueError(f"{what}: expected adapter_model.safetensors in {folder}")


def lora_tensors(folder: str) -> tuple[dict[str, Tensor], float]:
    """Return all tensors of a lane's adapter by their names in PEFT's files, and its scale s."""
    config = checked_config(folder, folder)
    with safe_open(Path(folder, "adapter_model.safetensors"), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    return tensors, config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def same_weights(what: str, folder: str, recorded: str, base: Source) -> None:
    """Raises ValueError for an adapter of another base. The fingerprint decides, if training recorded one."""
    expected = read_object(what, folder, "genarm.json").get("base_fingerprint")
    found = checkpoint_fingerprint(base) if expected is not None else None
    if expected is not None and found is not None:
        if found != expected:
            raise ValueError(
                f"{what} is an adapter of {recorded!r} with fingerprint {expected}: expected one of the base"
                f" {os.fspath(base)!r}, whose fingerprint is {found}; merge it into a copy of its own base, and serve"
                " that as the ARM"
            )
        return
    if not _same_place(recorded, base):
        raise ValueError(
            f"{what} is an adapter of {recorded!r}: expected one of the base {os.fspath(base)!r}; merge it into a copy"
            " of its own base (PEFT's merge_and_unload), and serve that as the ARM"
        )
    warnings.warn(f"{what}: no fingerprint to compare with the base's, so {recorded!r} is believed", stacklevel=2)


def _same_place(recorded: str, base: Source) -> bool:
    name = os.fspath(base)
    return recorded == name or (os.path.isdir(recorded) and os.path.realpath(recorded) == os.path.realpath(name))
