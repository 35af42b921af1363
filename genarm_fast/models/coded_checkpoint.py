"""Read checkpoints of GPTQ, AWQ and compressed-tensors without these packages.

A checkpoint gives a plain model, and the codes of its matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from genarm_fast.kernels.quant_linear import QuantWeight
from genarm_fast.models import codes
from genarm_fast.models.files import WEIGHTS, read_object, refusing
from genarm_fast.models.hub import Source

METHODS = ("awq", "compressed-tensors", "gptq")
# Names of the tensors of a coded matrix. The first ones are always there, see REQUIRED_TENSOR_COUNTS.
TENSOR_NAMES = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": (
        "weight_scale",
        "weight_packed",
        "weight",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    ),
}
# How many of the first TENSOR_NAMES a coded matrix must have.
REQUIRED_TENSOR_COUNTS = {"gptq": 3, "awq": 3, "compressed-tensors": 1}
# Tensors that quantise activations. Activations stay bfloat16 here, so these tensors are dropped.
ACTIVATION_TENSORS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
READERS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], codes.CodedMatrix]] = {
    "gptq": codes.gptq,
    "awq": codes.awq,
    "compressed-tensors": codes.compressed_tensors,
}


def quantization_config_of(member: str, location: Source) -> dict[str, Any] | None:
    """Return the quantization_config of a checkpoint's config.json, or None if it has none."""
    found = read_object(member, location, "config.json").get("quantization_config")
    return found if isinstance(found, dict) else None


def method_of(config: Mapping[str, Any]) -> str:
    return str(config.get("quant_method", "")).replace("_", "-").lower()


def check_method(what: str, location: Source, config: Mapping[str, Any], how: str) -> None:
    """Raises ValueError for a checkpoint whose codes can't be read here. The error names the checkpoint's method."""
    method = method_of(config)
    if method not in METHODS:
        raise ValueError(f"{what}: a checkpoint of quant_method={method!r}: expected none, or {', '.join(METHODS)}")
    if how != "exact":
        raise ValueError(f"{what}: a checkpoint of {method}: expected quantization='exact', which takes its codes")
    if not Path(location).is_dir():
        raise ValueError(f"{what}: a checkpoint of {method}: expected a folder, where codes are read")


def read(what: str, folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, QuantWeight]]:
    """Return the plain model's tensors, and the codes of each coded matrix that `quant_linear` can hold.

    Coded matrices are among the tensors as bfloat16.

    Raises:
        ValueError: tensors that do not fit together, and kinds of codes that are not read here. The error names the
            matrix.
    """
    method, tensors = method_of(config), dict(_tensors(what, folder))
    parts, marks = TENSOR_NAMES[method], ("weight_scale",) if method == "compressed-tensors" else ("qweight",)
    taken: dict[str, QuantWeight] = {}
    for module in sorted(name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in marks):
        own = {part: tensors.pop(f"{module}.{part}") for part in parts if f"{module}.{part}" in tensors}
        for part in ACTIVATION_TENSORS:
            tensors.pop(f"{module}.{part}", None)
        name = f"{module}.weight"
        missing = [part for part in parts[: REQUIRED_TENSOR_COUNTS[method]] if part not in own]
        if missing:
            raise ValueError(
                f"{what}: {module}: expected {', '.join(parts[: REQUIRED_TENSOR_COUNTS[method]])}, lacks {missing[0]}"
            )
        with refusing(f"{what}: {name} of {method}", "codes, zeros and scales that fit together"):
            found = READERS[method](own, _scheme(config, method))
            if not found.scales.isfinite().all():
                raise ValueError("scales are NaN or infinite")
            if int(found.group.min()) < 0 or int(found.group.max()) >= found.scales.shape[1]:
                raise ValueError(f"groups up to {int(found.group.max())}, of {found.scales.shape[1]}")
            quant_weight = found.as_quant_weight()
            tensors[name] = codes.as_bfloat16(found, quant_weight)
        if quant_weight is not None:
            taken[name] = quant_weight
    return tensors, taken


def _scheme(config: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    """Return the settings that describe how all matrices are coded.

    compressed-tensors may list several groups of matrices. Raises ValueError if their settings differ.
    """
    if method != "compressed-tensors":
        return config
    schemes = [group for group in (config.get("config_groups") or {}).values() if group.get("weights")]
    if not schemes or any(scheme["weights"] != schemes[0]["weights"] for scheme in schemes):
        raise ValueError(f"{len(schemes)} kinds of weights in config_groups: expected one")
    return schemes[0]


def _tensors(what: str, folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob(WEIGHTS[0]))
    if not files:
        raise ValueError(f"{what}: {folder}: expected safetensors, it has none")
    for path in files:
        with refusing(f"{what}: {path}", "a whole safetensors file"), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)
