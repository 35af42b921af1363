"""Checkpoints of GPTQ, AWQ and compressed-tensors, packed as their formats specify, from codes the test knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import build_model, build_tokenizer
from torch import Tensor

WIDE = {"hidden_size": 64, "intermediate_size": 96}


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [n, m] into int32 [n, m · bits / 32], a word's first code in its lowest bits, without vector code."""
    each, rows = 32 // bits, []
    for row in codes.tolist():
        row = row + [0] * (-len(row) % each)
        packed = [sum(row[at + i] << (bits * i) for i in range(each)) for at in range(0, len(row), each)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int32)


class Drawn:
    """A random weight: codes [out, in], zeros and scales [out, groups], and group [in], the group of each input."""

    def __init__(self, out: int, width: int, *, bits: int, size: int, symmetric: bool, seed: int, scattered: bool):
        generator = torch.Generator().manual_seed(seed)
        groups, most = width // size, 1 << bits
        self.codes = torch.randint(0, most, (out, width), generator=generator)
        self.zeros = torch.full((out, groups), most // 2)
        if not symmetric:
            self.zeros = torch.randint(1, most, (out, groups), generator=generator)
        self.scales = ((torch.rand(out, groups, generator=generator) + 0.5) * 0.6 / most).half()
        self.group = torch.arange(width) // size
        if scattered:
            self.group = self.group[torch.randperm(width, generator=generator)]

    def weight(self) -> Tensor:
        exact = (self.codes - self.zeros[:, self.group]).double() * self.scales.double()[:, self.group]
        return exact.to(torch.bfloat16)  # rounded once: these products have less than 24 bits


def gptq(drawn: Drawn, bits: int, version: str = "gptq") -> dict[str, Tensor]:
    stored = drawn.zeros - int(version == "gptq")
    return {
        "qweight": words(drawn.codes, bits).T.contiguous(),
        "qzeros": words(stored.T % (1 << bits), bits),
        "scales": drawn.scales.T.contiguous(),
        "g_idx": drawn.group.int(),
    }


def awq(drawn: Drawn, bits: int) -> dict[str, Tensor]:
    def ordered(codes: Tensor) -> Tensor:  # codes [in or groups, out]
        at = torch.arange(codes.shape[1]).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
        return words(codes[:, at], bits)

    return {
        "qweight": ordered(drawn.codes.T),
        "qzeros": ordered(drawn.zeros.T),
        "scales": drawn.scales.T.contiguous(),
    }


def packed(drawn: Drawn, bits: int, *, symmetric: bool) -> dict[str, Tensor]:
    parts = {
        "weight_packed": words(drawn.codes, bits),
        "weight_scale": drawn.scales,
        "weight_shape": torch.tensor(drawn.codes.shape),
    }
    return parts if symmetric else parts | {"weight_zero_point": words(drawn.zeros.T, bits).T.contiguous()}


def int_quantized(drawn: Drawn, bits: int, *, symmetric: bool) -> dict[str, Tensor]:
    parts = {"weight": (drawn.codes - (1 << bits - 1)).to(torch.int8), "weight_scale": drawn.scales}
    return parts if symmetric else parts | {"weight_zero_point": (drawn.zeros - (1 << bits - 1)).to(torch.int8)}


def save(
    folder: Path, config: dict[str, Any], pack: Callable[[Drawn], dict[str, Tensor]], **draw: Any
) -> dict[str, Tensor]:
    """Write a checkpoint whose linears except the head are coded; return all weights that it stands for, by name."""
    model = build_model("llama", 0, **WIDE).to(torch.bfloat16)
    expected, stored = dict(model.state_dict()), {}
    for index, (name, tensor) in enumerate(sorted(expected.items())):
        if not name.endswith("proj.weight"):
            stored[name] = tensor
            continue
        options = {"bits": 4, "size": 32, "symmetric": True, "scattered": False} | draw
        drawn = Drawn(*tensor.shape, seed=index, **options)
        expected[name] = drawn.weight()
        stored |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in pack(drawn).items()}
    model.config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": config, "dtype": "bfloat16"}))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    build_tokenizer().save_pretrained(folder)
    return expected
