"""Make a module tree run fast: attention over our cache, linears for few rows, and fused small operations.

Norms and rotations are replaced only if our versions give the same bits on a trial. The name of a class does not tell
where the class rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from genarm_fast.kernels import _dispatch, _native
from genarm_fast.kernels.rotary import rotary
from genarm_fast.kernels.silu_mul import silu_mul
from genarm_fast.models import attention, flash_attention
from genarm_fast.models.fused_decoder import fused_forward
from genarm_fast.models.known_decoders import Norm
from genarm_fast.models.lora_lanes import hooked
from genarm_fast.models.quantized import QuantizedMatrix, cpu_linear
from genarm_fast.models.stacking import stacked_forward
from genarm_fast.models.weights import Movable, trees_over

# All names that the forward of Llama's MLP uses.
GATED_MLP_NAMES = ("down_proj", "act_fn", "gate_proj", "up_proj")


@torch.inference_mode()
def make_fast(model: Any, others: Iterable[nn.Module] = ()) -> Any:
    """Change a module tree in place so that it runs fast, and return it. No model may share its config or modules.

    Its new attribute `runs_by` names the forward that it got, in words. others: models that share weights with this
    one. On a GPU weights may move, in all trees that `share_weights` made of these models; the numbers do not change.
    """
    wants_flash = model.config._attn_implementation == "flash_attention_2"
    model.config._attn_implementation = (flash_attention if wants_flash else attention).IMPLEMENTATION
    forward: Callable[..., Any] | None = None
    model.runs_by = "its own forward"
    if on_gpu(model):
        forward, model.runs_by = stacked_forward(model.base_model, Movable(trees_over([model, *others])))
    if forward is None and _native.core is not None:
        fast = {module: found for module in model.modules() if (found := _fast(module)) is not None}
        for module, own in fast.items():
            module.forward = own
        forward = fused_forward(model.base_model, fast)
        model.runs_by = model.runs_by if forward is None else "fused, with the bits of its own forward"
    if forward is not None:
        model.base_model.forward = forward
    return model


def on_gpu(model: Any) -> bool:
    """Whether the model is on a kind of GPU that our kernels serve."""
    return model.get_input_embeddings().weight.device.type in _dispatch.GPUS


def _fast(module: nn.Module) -> Callable[..., Any] | None:
    """Return a faster function with the module's results, if the C++ core has one; else None."""
    if "forward" in vars(module):
        return None
    used = getattr(type(module).forward, "__code__", _fast.__code__).co_names
    if "apply_rotary_pos_emb" in used:
        return _fast_rotation(module)
    if used == GATED_MLP_NAMES:
        activation: Any = module.act_fn
        if type(activation).__name__ in ("SiLU", "SiLUActivation") and not hooked(activation):
            return partial(_gated, module)
    # A weight that a hook computes for each call is no parameter.
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_cpu:
        return None
    # Of few rows, these linears are faster than PyTorch's, and of many about as fast.
    if type(module) is nn.Linear and weight.dtype in (torch.bfloat16, torch.float32):
        return cpu_linear(weight, module.bias)
    if type(module) is nn.Embedding and isinstance(weight, QuantizedMatrix):
        return weight.linear.rows
    if type(module).__name__.endswith("RMSNorm") and weight.dim() == 1:
        return _fast_norm(module, weight.detach())
    return None


def _gated(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(silu_mul(mlp.gate_proj(x), mlp.up_proj(x)))


def _fast_norm(module: nn.Module, weight: Tensor) -> Norm | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return None
    x = torch.linspace(-3, 5, 2 * weight.numel(), device=weight.device).view(2, -1).to(weight.dtype)
    for offset in (0.0, 1.0):
        norm = Norm(weight, eps, offset)
        if torch.equal(module(x), norm(x)):
            return norm
    return None


def _fast_rotation(module: nn.Module) -> Callable[..., Any] | None:
    """Return an attention's forward with `rotary` in place of the rotation that its file defines.

    None if `rotary` does not give the same bits.
    """
    forward = type(module).forward
    theirs = forward.__globals__["apply_rotary_pos_emb"]
    width = getattr(module, "head_dim", None)
    if not isinstance(forward, FunctionType) or not isinstance(width, int) or width % 2:
        return None
    states = (
        torch.linspace(-3, 5, 4 * width).view(1, 2, 2, width),
        torch.linspace(-2, 1, 2 * width).view(1, 1, 2, width),
    )
    whole, half = (torch.linspace(0, 1, 2 * n).view(1, 2, n) for n in (width, width // 2))
    try:
        pairs = zip(theirs(*states, whole.cos(), whole.sin()), rotary(*states, whole.cos(), whole.sin()))
        same = all(torch.equal(their, our) for their, our in pairs)
    except (TypeError, RuntimeError):  # the function has another signature
        return None
    with suppress(RuntimeError):
        theirs(*states, half.cos(), half.sin())
        # It rotates only as many dimensions as it has angles, which `rotary` does not.
        return None
    if not same:
        return None
    names = {**forward.__globals__, "apply_rotary_pos_emb": rotary}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(ours, module)
