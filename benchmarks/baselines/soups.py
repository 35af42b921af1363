"""Rewarded Soups (arXiv 2306.04488): averages the weights of policies that were trained for one objective each.

    python benchmarks/baselines/soups.py OUTPUT ADAPTER=COEFFICIENT ADAPTER=COEFFICIENT ...

LoRA adapters can be averaged in two ways. `matrices` averages all A and all B, as the comparison in GenARM's paper
does. It keeps the rank, but (Σ c B)(Σ c A) is not the average Σ c B A of the products. `products` is that average
exactly: it stacks all A, and puts all c B side by side, so the ranks add up. Both write an ordinary adapter, so one
engine can serve many points of a front as LoRA lanes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = ("matrices", "products")
MUST_AGREE = ("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern", "bias")


def soup(folders: Sequence[Path], coefficients: Sequence[float], output: Path, kind: str = "matrices") -> Path:
    """Write the averaged adapter into `output`, with the other files of the first folder except its report.

    Raises:
        ValueError: coefficients that do not sum to 1, an unknown kind, or adapters of different shapes.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    if len(folders) != len(coefficients) or not math.isclose(sum(coefficients), 1.0, abs_tol=1e-6):
        raise ValueError(f"coefficients={list(coefficients)}: expected {len(folders)} numbers that sum to 1")
    configs = [json.loads((folder / CONFIG).read_text()) for folder in folders]
    for folder, config in zip(folders, configs):
        for name in MUST_AGREE:
            if _plain(config.get(name)) != _plain(configs[0].get(name)):
                raise ValueError(f"{folder}: {name}={config.get(name)!r}: expected {configs[0].get(name)!r}")
    weights = [load_file(folder / WEIGHTS) for folder in folders]
    if any(each.keys() != weights[0].keys() for each in weights):
        raise ValueError(f"folders={[str(folder) for folder in folders]}: expected adapters of the same modules")

    output.mkdir(parents=True, exist_ok=True)
    for path in folders[0].iterdir():
        if path.is_file() and path.name not in (WEIGHTS, CONFIG, "report.json"):
            shutil.copyfile(path, output / path.name)
    combine = _averaged if kind == "matrices" else _joined
    save_file(combine(weights, coefficients), output / WEIGHTS)
    config = dict(configs[0])
    if kind == "products":  # keep the scale: alpha / r, or alpha / √r with rsLoRA
        count = len(folders)
        config["r"] *= count
        config["lora_alpha"] *= math.sqrt(count) if config.get("use_rslora") else count
    (output / CONFIG).write_text(json.dumps(config, indent=2))
    return output


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, list) else value


def _averaged(weights: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]) -> dict[str, Tensor]:
    return {
        name: sum(c * each[name].float() for c, each in zip(coefficients, weights)).to(tensor.dtype).contiguous()  # type: ignore[union-attr]
        for name, tensor in weights[0].items()
    }


def _joined(weights: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]) -> dict[str, Tensor]:
    joined = {}
    for name in weights[0]:
        parts = [each[name].float() for each in weights]
        if "lora_B" in name:
            parts = [c * part for c, part in zip(coefficients, parts)]
        joined[name] = torch.cat(parts, 1 if "lora_B" in name else 0).to(weights[0][name].dtype).contiguous()
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("parts", nargs="+", metavar="ADAPTER=COEFFICIENT")
    parser.add_argument("--kind", choices=KINDS, default="matrices")
    args = parser.parse_args()
    parts = [part.rpartition("=") for part in args.parts]
    soup([Path(folder) for folder, _, _ in parts], [float(c) for _, _, c in parts], args.output, args.kind)


if __name__ == "__main__":
    main()
