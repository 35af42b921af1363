"""The model that is trained. Its log-probabilities of responses take the cheapest path that proves right."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from genarm_fast.kernels.arm_logps import IGNORE, arm_logps
from genarm_fast.models.causal_lm import load_causal_lm
from genarm_fast.models.files import refusing
from genarm_fast.models.quantized import is_quantized
from genarm_fast.train.batches import Layout, rows, shared
from genarm_fast.train.config import TrainConfig
from genarm_fast.train.encode import Encoded


class PairModel(nn.Module):
    """A causal LM as a function from a batch of N pairs to Σ log π of its responses, [2N] float32, chosen first."""

    causal: Any
    # Tells the Trainer that the loss is already a mean over all pairs of the step.
    accepts_loss_kwargs = True

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        if is_quantized(lm):
            raise ValueError("model: expected weights of 16 bits or more to train on, they are held in 8 or 4 bits")
        self.lm = lm
        causal = lm.get_base_model() if hasattr(lm, "get_base_model") else lm  # type: ignore[operator]
        object.__setattr__(self, "causal", causal)  # part of lm already, so not registered as a second module
        config = self.causal.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        scales = [getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling")]
        self.scale = scales[0] / scales[1]  # Cohere multiplies, Granite divides
        # With LoRA on it, or a trained copy, the output layer is another module than a plain linear one.
        self.fused = type(self.causal.get_output_embeddings()) is nn.Linear

    def forward(self, **batch: Tensor) -> Tensor:
        return self.token_logps(**batch).sum(-1)

    def token_logps(self, index: Tensor, targets: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return the log-probabilities of `targets`, [2N, R], 0 where there is none. Arguments: as from `Collator`."""
        # This attention adds its mask to the scores.
        if attention_mask.ndim == 4 and self.causal.config._attn_implementation == "eager":
            bias = torch.zeros_like(attention_mask, dtype=self.causal.dtype)
            attention_mask = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
        inputs["attention_mask"] = attention_mask
        if not self.fused:
            logits = self.causal(**inputs, use_cache=False).logits.flatten(0, 1)[index].float()
            picked = logits.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
            return (picked - logits.logsumexp(-1)).where(targets != IGNORE, 0.0)
        hidden = self.causal.get_decoder()(**inputs, use_cache=False).last_hidden_state
        head = self.causal.get_output_embeddings()
        return arm_logps(
            hidden.flatten(0, 1)[index],
            head.weight,
            targets,
            bias=head.bias,
            logit_scale=self.scale,
            softcap=self.softcap,
            return_tokens=True,
        )


def load_base(config: TrainConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load the base in the precision that it is served in. Full fine-tuning keeps float32 master weights.

    If the base caps attention's scores (Gemma-2), "sdpa" becomes "eager". PyTorch's attention has no cap, and
    transformers silently leaves it out.
    """
    lm = load_causal_lm(
        "base",
        config.base,
        trust_remote_code=config.trust_remote_code,
        dtype=torch.float32 if config.method == "full" else dtype,
        attn_implementation=config.attn_implementation,
    )
    capped = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
    if capped and config.attn_implementation == "sdpa":
        lm.set_attn_implementation("eager")
    return lm


def add_lora(lm: PreTrainedModel, config: TrainConfig) -> nn.Module:
    """Put LoRA on the linear layers in `config.lora_targets`, or on `default_targets`.

    Raises:
        ValueError: a name that no linear module of the model has; the message lists the names that exist. Targets that
            PEFT refuses.
    """
    from peft import LoraConfig, get_peft_model

    linear, others = linear_layers(lm)
    available = sorted({name.rpartition(".")[2] for name in linear})
    for target in config.lora_targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            raise ValueError(
                f"lora_targets={config.lora_targets!r}: {config.base} has no linear module {target!r}: "
                f"expected some of {', '.join(available)}"
            )
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=sorted(config.lora_targets or default_targets(lm)),
        exclude_modules=others or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )
    with refusing(
        f"lora_targets={config.lora_targets!r}, lora_dropout={config.lora_dropout}", "a LoRA that PEFT can make"
    ):
        return get_peft_model(lm, lora)


def linear_layers(lm: PreTrainedModel) -> tuple[dict[str, nn.Linear | Conv1D], list[str]]:
    """Return the linear layers that text runs through, by name, and the names of all other linear layers.

    Training pairs are texts, so a LoRA on a layer that reads images would get no gradient. Such layers may have the
    same names as layers for text.
    """
    decoder, head = lm.get_decoder(), lm.get_output_embeddings()
    linear = {name: module for name, module in lm.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    inside = {id(module) for module in (*decoder.modules(), *([] if head is None else head.modules()))}
    text = {name: module for name, module in linear.items() if id(module) in inside}
    return text, sorted(set(linear) - set(text))


def default_targets(lm: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers that LoRA trains by default: all but the output layer.

    In a mixture of experts, these are only the layers outside of its feed-forward parts. Routers are not trained, and
    experts are no linear layers. PEFT would also match experts by the names of dense feed-forward layers.
    """
    experts = [name.split(".") for name, parameter in lm.named_parameters() if parameter.dim() == 3]
    experts += [name.split(".") for name, _ in lm.named_modules() if name.endswith(".experts")]
    # In "model.layers.3.mlp.experts.down_proj" this is "mlp", the part of a layer that follows the layer's number.
    parts = {parts[i + 1] for parts in experts for i, part in enumerate(parts[:-2]) if part.isdecimal()}
    head = lm.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in linear_layers(lm)[0].items()
            if module is not head and not parts & set(name.split("."))
        }
    )


def choose_paths(model: PairModel, probe: list[Encoded]) -> tuple[Layout, bool]:
    """Return the layout, and whether `arm_logps` replaces the model's own logits. Sets `model.fused`.

    Each choice is tried on real pairs, and must agree with the model's own logits.
    """
    tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in probe)
    # Mean error of a token's log-probability; bfloat16 logits near 16 are 0.06 apart.
    tolerance = 1e-3 if model.causal.dtype == torch.float32 else 0.1

    def logps(layout: Layout) -> Tensor:
        batch = shared(probe, 0) if layout == "shared" else rows(probe, 0)
        return model.token_logps(**{name: tensor.to(model.causal.device) for name, tensor in batch.items()})

    def right(found: Tensor) -> bool:
        return float((found - wanted).abs().sum()) / tokens < tolerance

    training = model.training
    model.eval()
    with torch.no_grad():
        fusable, model.fused = model.fused, False
        wanted = logps("rows")
        model.fused = fusable
        if fusable and not right(logps("rows")):
            model.fused = False
        layout: Layout = "shared" if _takes_own_masks(model) and right(logps("shared")) else "rows"
    model.train(training)
    return layout, model.fused


def _takes_own_masks(model: PairModel) -> bool:
    """Whether attention is plain enough for a mask and positions of our own."""
    config = model.causal.config.get_text_config()
    return (
        config._attn_implementation in ("sdpa", "eager")
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and "position_ids" in inspect.signature(model.causal.get_decoder().forward).parameters
    )


def choose_dtype(name: str) -> torch.dtype:
    """Return the dtype of this name. "auto" is bfloat16 if this machine computes faster with it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if torch.backends.mps.is_available():
        return torch.float32
    # A CPU with bf16 instructions may still multiply bf16 slower (seen: 88 against 150 GFLOP/s a core with AVX-512).
    faster = 1.2 * _matmul_seconds(torch.bfloat16) < _matmul_seconds(torch.float32)
    return torch.bfloat16 if faster else torch.float32


def _matmul_seconds(dtype: torch.dtype) -> float:
    x, w = torch.ones(512, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x @ w
        times.append(time.perf_counter() - start)
    return min(times)
