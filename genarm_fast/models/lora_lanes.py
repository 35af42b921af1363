"""Members over the same weights in one forward: rows are [lanes × R], and LoRA is added on each lane's rows.

A decode step of few rows takes as long as the weights take to arrive from memory, so one more lane costs little. Lanes
are recognised by the loaded modules: the same tree over the same storage, except for plain LoRA linears. Every other
member (DoRA, saved modules, adapted embeddings, linears that others quantised, another dtype) keeps its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genarm_fast.kernels.linear import Lora
from genarm_fast.kernels.small_linear import SmallLinear
from genarm_fast.models.forward_context import running, running_lanes, spans_of
from genarm_fast.models.quantized import cpu_linear
from genarm_fast.models.weights import share_weights


class LaneLinear(nn.Module):
    """A linear that computes y = x Wᵀ once for all rows, and adds each lane's LoRA on its rows.

    x: [lanes × R, q, in].
    """

    def __init__(self, linear: nn.Linear, adapters: dict[int, Lora]) -> None:
        super().__init__()
        self.linear = linear
        self.index = {lane: i for i, lane in enumerate(adapters)}
        self.loras = list(adapters.values())  # b is PEFT's own weight; SmallLinear holds a copy of b
        self.run = cpu_linear(linear.weight, linear.bias, self.loras)

    def forward(self, x: Tensor) -> Tensor:
        lanes, rows = running_lanes()
        if x.dim() != 3 or x.shape[0] != len(lanes) * rows:
            raise _RegroupedRows
        return self.run(x, spans_of(self.index, x.shape[1]))


@torch.inference_mode()
def reread(model: nn.Module, lanes: Collection[int]) -> None:
    """Take over the current weights of these lanes' LoRAs. A is read in place, like all other weights; B is a copy."""
    for module in model.modules():
        if isinstance(module, LaneLinear):
            for i in (module.index[lane] for lane in lanes if lane in module.index):
                module.run.loras[i].b.copy_(module.loras[i].b)


def linears_of(model: nn.Module) -> list[SmallLinear]:
    """Return the linears whose memory the C++ core reads at fixed addresses."""
    runs = (module.run if isinstance(module, LaneLinear) else vars(module).get("forward") for module in model.modules())
    return [run for run in runs if isinstance(run, SmallLinear)]


class _RegroupedRows(Exception):
    """A model passes its linears something else than all rows in order, as mixtures of experts do."""


@torch.inference_mode()
def share_forwards(models: Sequence[Any], known: Callable[[Any], bool] = lambda decoder: False) -> list[Any]:
    """Return the module tree that runs each model: a common one for all lanes over the same weights, else the model.

    In a common tree, lane i is `models[i]`. The models are not changed, and no weight is copied. known: whether a
    decoder is known to pass its linears all rows in order. Other decoders are tried by a forward.
    """
    shared = dict(enumerate(models))
    groups: dict[Any, list[int]] = {}
    skeletons = [_skeleton(model) for model in models]
    for i, (key, _) in enumerate(skeletons):
        if key is not None:
            groups.setdefault(key, []).append(i)
    for lanes in groups.values():
        if len(lanes) > 1:
            model = _merge(models[lanes[0]], {lane: skeletons[lane][1] for lane in lanes})
            plain_head = not isinstance(model.get_output_embeddings(), LaneLinear)
            if (plain_head and known(model.base_model)) or _keeps_rows(model, lanes):
                shared.update(dict.fromkeys(lanes, model))
    return list(shared.values())


def _keeps_rows(model: Any, lanes: Sequence[int]) -> bool:
    """Whether the model passes its linears all rows in order, by a forward of two tokens.

    A forward of one token would not show that rows and positions are exchanged.
    """
    tokens = torch.zeros(len(lanes), 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    try:
        with running(lanes, 1):
            model(input_ids=tokens, use_cache=False)
    except _RegroupedRows:
        return False
    return True


def _skeleton(model: Any) -> tuple[Any, dict[str, Lora]]:
    """Return what models must have in common to share a forward, and the LoRAs by module name.

    The first is None for a model that can't share a forward.
    """
    parts: list[Any] = [repr(model.config.to_dict())]
    adapters: dict[str, Lora] = {}
    devices: set[torch.device] = set()

    def visit(module: nn.Module, path: str) -> bool:
        lora = _plain_lora(module) if hasattr(module, "lora_A") else None
        if lora is not None and not hooked(module):
            adapters[path] = lora
            module = module.base_layer  # type: ignore[assignment]
        if hooked(module) or type(module).__module__.startswith("peft."):
            return False
        tensors = [*module._parameters.items(), *module._buffers.items()]
        devices.update(tensor.device for _, tensor in tensors if tensor is not None)
        parts.append((path, type(module), *((n, t if t is None else _storage(t)) for n, t in tensors)))
        return all(visit(child, f"{path}.{name}" if path else name) for name, child in module.named_children())

    if not visit(model, "") or len(devices) != 1 or devices.pop().type == "meta":
        return None, {}
    return tuple(parts), adapters


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module does anything besides its class's forward."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _plain_lora(module: Any) -> Lora | None:
    """Return the adapter of PEFT's LoRA linear; None if the linear computes more than W x + s · B A x."""
    from peft.tuners.lora.layer import Linear

    base = getattr(module, "base_layer", None)
    if type(module) is not Linear or type(base) is not nn.Linear:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or names[0] in module.lora_variant or module.merged or module.disable_adapters:
        return None
    down, up = module.lora_A[names[0]], module.lora_B[names[0]]
    if up.bias is not None or not down.weight.dtype == up.weight.dtype == base.weight.dtype:
        return None
    return Lora(down.weight.detach(), up.weight.detach().T, float(module.scaling[names[0]]))


def _merge(model: Any, adapters: dict[int, dict[str, Lora]]) -> Any:
    """Return a copy of the tree, over the same weights, with a `LaneLinear` wherever any lane has a LoRA."""
    merged = share_weights(model)
    for path in sorted({path for by_path in adapters.values() for path in by_path}):
        layer: Any = merged.get_submodule(path)
        linear = layer if isinstance(layer, nn.Linear) else layer.base_layer
        by_lane = {lane: by_path[path] for lane, by_path in adapters.items() if path in by_path}
        merged.set_submodule(path, LaneLinear(linear, by_lane))
    return merged
