"""The model that is trained: base, LoRA, and the log-probabilities of responses on the cheapest path that is right."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..kernels.arm_logps import IGNORE, arm_logps
from .batches import Layout, rows, shared
from .config import TrainConfig
from .encode import Encoded


class PairModel(nn.Module):
    """A causal LM seen as a function from a batch of pairs to Σ log π of its responses, [2N] float32."""

    accepts_loss_kwargs = True  # the trainer's loss is already averaged over all pairs of the step

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        causal: Any = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        object.__setattr__(self, "causal", causal)  # the same modules again: not registered twice
        config = causal.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        # LoRA or a saved copy on the output layer makes it another module than a plain linear one.
        self.fused = type(causal.get_output_embeddings()) is nn.Linear
        self.eager = causal.config._attn_implementation == "eager"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        index: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        return self.token_logps(input_ids, attention_mask, index, targets, position_ids).sum(-1)

    def token_logps(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        index: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """[2N, R] log-probabilities of `targets`, 0 where there is none."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if self.eager and attention_mask.ndim == 4:
            dtype = self.causal.dtype
            inputs["attention_mask"] = torch.zeros_like(attention_mask, dtype=dtype).masked_fill(
                ~attention_mask, torch.finfo(dtype).min
            )
        if not self.fused:
            logits = self.causal(**inputs).logits.flatten(0, 1)[index].float()
            picked = logits.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
            return (picked - logits.logsumexp(-1)).where(targets != IGNORE, 0.0)
        hidden = self.causal.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)[index]
        head = self.causal.get_output_embeddings()
        return arm_logps(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            logit_scale=self.scale,
            softcap=self.softcap,
            return_tokens=True,
        )


def load_base(config: TrainConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The base in the precision that it will be served in; full fine-tuning keeps float32 master weights."""
    return AutoModelForCausalLM.from_pretrained(
        config.base,
        dtype=torch.float32 if config.method == "full" else dtype,
        attn_implementation=config.attn_implementation,
    )


def add_lora(lm: PreTrainedModel, config: TrainConfig) -> nn.Module:
    """LoRA on every linear layer but the output, or on the named ones.

    Raises:
        ValueError: a name that no linear module of the model has, with those that it has.
    """
    from peft import LoraConfig, get_peft_model

    head = lm.get_output_embeddings()
    linear = {name: module for name, module in lm.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    available = sorted({name.rpartition(".")[2] for name in linear})
    for target in config.lora_targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            raise ValueError(
                f"lora_targets={config.lora_targets!r}: {config.base} has no linear module {target!r}; "
                f"expected some of {', '.join(available)}"
            )
    default = {name.rpartition(".")[2] for name, module in linear.items() if module is not head}
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=sorted(config.lora_targets or default),
    )
    return get_peft_model(lm, lora)


def choose_layout(model: PairModel, probe: list[Encoded]) -> dict[str, str]:
    """Picks the output path and the layout, each proved on real pairs against the model's own logits.

    Sets `model.fused`; returns what was chosen, for the report.
    """
    device = model.causal.device
    lengths = [len(side) for pair in probe for side in (pair.chosen, pair.rejected)]
    tolerance = 1e-3 if model.causal.dtype == torch.float32 else 0.1

    def logps(layout: Layout) -> Tensor:
        batch = {k: v.to(device) for k, v in (shared if layout == "shared" else rows)(probe, 0).items()}
        return model.token_logps(**batch)

    def same(found: Tensor, wanted: Tensor) -> bool:
        return bool((found - wanted).abs().sum() / sum(lengths) < tolerance)

    training = model.training
    model.eval()
    with torch.no_grad():
        fused, model.fused = model.fused, False
        wanted = logps("rows")
        if fused:
            model.fused = True
            model.fused = same(logps("rows"), wanted)
        layout: Layout = "shared" if _may_share(model) and same(logps("shared"), wanted) else "rows"
    model.train(training)
    return {"layout": layout, "head": "fused" if model.fused else "full logits"}


def _may_share(model: PairModel) -> bool:
    config = model.causal.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config._attn_implementation in ("sdpa", "eager")
        and kinds == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and "position_ids" in inspect.signature(model.causal.get_decoder().forward).parameters
    )


def choose_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16; "auto" is bfloat16 where this machine gains from it."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if torch.backends.mps.is_available():
        return torch.float32
    # CPUs with bf16 instructions may still multiply it slower than float32 (an AVX-512 machine: 88 against 150 GFLOP/s).
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if 1.2 * seconds[torch.bfloat16] < seconds[torch.float32] else torch.float32


def _matmul_seconds(dtype: torch.dtype) -> float:
    x, w = torch.ones(512, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x @ w
        times.append(time.perf_counter() - start)
    return min(times)
