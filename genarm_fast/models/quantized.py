"""Models whose matrices are held in 8 or 4 bits, for CPUs: the choice of codes, and a tensor that stands for a matrix.

The modules stay transformers' own. Their weights are `QuantizedMatrix` tensors, whose linear runs the op quant_linear.
So a forward of transformers, and a naive decoder over it, computes what our runners compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genarm_fast.kernels.linear import Lora
from genarm_fast.kernels.quant_linear import QuantLinear, QuantWeight, dequantize, exact, quantize
from genarm_fast.kernels.small_linear import SmallLinear
from genarm_fast.models.fingerprint import codes_fingerprint, fingerprint

QUANTIZATIONS = ("exact", "int8", "int4")


class QuantizedMatrix(Tensor):
    """A bfloat16 matrix [out, in] whose memory holds codes of 8 or 4 bits. It can't be written to.

    `functional.linear` runs the op quant_linear and `functional.embedding` looks up rows. Every other function gets the
    dequantised numbers, rounded to bfloat16.
    """

    linear: QuantLinear

    @staticmethod
    def __new__(cls, linear: QuantLinear) -> QuantizedMatrix:
        device = linear.packed.device
        self = Tensor._make_wrapper_subclass(cls, linear.shape, dtype=torch.bfloat16, device=device)
        self.linear = linear
        return self

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()

    def data_ptr(self) -> int:
        """Address of the codes, by which shared weights are recognised."""
        return self.linear.packed.data_ptr()

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the codes and scales."""
        return self.linear.packed.nbytes

    def bfloat16_values(self) -> Tensor:
        return dequantize(self.linear.weight).to(torch.bfloat16)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"QuantizedMatrix({tuple(self.shape)}, {self.linear.bits} bits)"

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedMatrix:
        return self  # a matrix that can't be written to needs no copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return QuantizedMatrix, (self.linear,)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is functional.linear:
            named = dict(zip(("input", "weight", "bias"), args)) | given
            x, weight, bias = named["input"], named["weight"], named.get("bias")
            if isinstance(weight, cls) and not isinstance(x, cls):
                return cpu_linear(weight, bias)(x)
        if func is functional.embedding and not any(given.get(name) for name in ("max_norm", "sparse")):
            named = dict(zip(("input", "weight"), args)) | given
            if isinstance(named["weight"], cls):
                return named["weight"].linear.rows(named["input"])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **given)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].linear)
        if func._schema.is_mutable:
            raise RuntimeError(f"{func}: expected a weight that can be written to, it is held in 8 or 4 bits")
        plain = torch.utils._pytree.tree_map_only(cls, cls.bfloat16_values, (args, dict(kwargs or {})))
        return func(*plain[0], **plain[1])


def cpu_linear(weight: Tensor, bias: Tensor | None = None, loras: Iterable[Lora] = ()) -> SmallLinear | QuantLinear:
    """Return the linear that multiplies by a weight on the CPU: quantised or plain, as the weight is held."""
    if isinstance(weight, QuantizedMatrix):
        own = weight.linear
        return QuantLinear.from_packed(own.packed, *own.shape, own.bits, bias, list(loras))
    return SmallLinear(weight, bias, list(loras))


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(parameter, QuantizedMatrix) for parameter in model.parameters())


@dataclass(frozen=True)
class Matrix:
    """How one matrix is held after quantisation."""

    name: str
    bits: int  # 16 for a matrix that stayed bfloat16
    bytes_before: int
    bytes_after: int
    largest_error: float  # error of a dequantised weight, rounded to bfloat16


@dataclass(frozen=True)
class Quantized:
    """A report of what `quantize_model` did to a model."""

    how: str
    # Fingerprint of the weights before: adapters of that base are adapters of this model.
    fingerprint: str | None
    matrices: tuple[Matrix, ...]
    codes_fingerprint: str = ""  # hash of codes and scales

    @property
    def bytes_before(self) -> int:
        return sum(matrix.bytes_before for matrix in self.matrices)

    @property
    def bytes_after(self) -> int:
        return sum(matrix.bytes_after for matrix in self.matrices)

    def __str__(self) -> str:
        kinds = {bits: sum(m.bits == bits for m in self.matrices) for bits in (4, 8, 16)}
        said = ", ".join(f"{count} in {bits} bits" for bits, count in kinds.items() if count)
        error = max((matrix.largest_error for matrix in self.matrices), default=0.0)
        size = f"{self.bytes_before / 1e6:.1f} MB before, {self.bytes_after / 1e6:.1f} MB after"
        return f"{self.how}: {said}; {size}; largest error of a weight {error:.3g}"


def check_quantization(name: str, quantization: Any) -> None:
    """Raises ValueError for a value that names no way of holding weights."""
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"{name}={quantization!r}: expected None or one of {', '.join(QUANTIZATIONS)}")


@torch.no_grad()
def quantize_model(what: str, model: Any, how: str, codes: Mapping[str, QuantWeight] | None = None) -> Quantized:
    """Hold the matrices of a bfloat16 model on the CPU in fewer bits, in place, one matrix after the other.

    what: the model's name in errors. how: "exact": each matrix in the fewest bits that give it back bit for bit, else
    unchanged. "int8": rounded to 8 bits. "int4": rounded to 4 bits, embedding and head to 8. codes: codes of a
    checkpoint, by the matrix's name; these are used as they are.

    Raises:
        ValueError: another dtype or device, and weights that are quantised already, that are NaN or infinite, or whose
            scales float16 cannot hold.
    """
    check_quantization("quantization", how)
    asked = f"{what}: quantization={how!r}"
    if getattr(model, "hf_quantizer", None) is not None or is_quantized(model):
        raise ValueError(f"{asked}: expected a model that is not quantised already")
    kinds = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    if not kinds <= {("cpu", torch.bfloat16)}:
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        raise ValueError(f"{asked}: expected dtype=torch.bfloat16 and device='cpu', got {found}")
    before = fingerprint(model)
    users: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding) and module.weight.numel():
            users.setdefault(module.weight, []).append((name, module))
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    report = []
    while users:
        weight, modules = users.popitem()  # no other reference keeps the bfloat16 weights alive when they are replaced
        named = modules[0][0]
        at_end = any(module is end for _, module in modules for end in ends)
        with _naming(f"{asked}: {named}.weight"):
            given = (codes or {}).get(f"{named}.weight")
            linear = _quantized_linear(weight.detach(), how, at_end) if given is None else QuantLinear(given)
        error = 0.0 if how == "exact" or linear is None else _largest_error(weight.detach(), linear)
        bits, after = (16, weight.nbytes) if linear is None else (linear.bits, linear.packed.nbytes)
        report.append(Matrix(f"{named}.weight", bits, weight.nbytes, after, error))
        if linear is not None:
            parameter = nn.Parameter(QuantizedMatrix(linear), requires_grad=False)
            for _, module in modules:
                module.weight = parameter
                # engine/verdict_key.py hashes the plain attributes of modules, and so tells the bits of weights apart.
                module.quantized_bits = linear.bits
        del weight
    model.quantized = Quantized(how, before, tuple(reversed(report)), codes_fingerprint(model))
    return model.quantized


class _naming:
    """A context manager that puts the name of a matrix before the text of a ValueError."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{self.name}: {error}") from error


def _quantized_linear(weight: Tensor, how: str, at_end: bool) -> QuantLinear | None:
    if how == "exact":
        found = next((codes for bits in (4, 8) if (codes := exact(weight, bits)) is not None), None)
        return None if found is None else QuantLinear(found)
    return QuantLinear(quantize(weight, 8 if how == "int8" or at_end else 4))


def _largest_error(weight: Tensor, linear: QuantLinear) -> float:
    rows = torch.arange(len(weight)).split(1024)
    return max(float((linear.rows(part).float() - weight[part].float()).abs().max()) for part in rows)
