"""Models made on the device: random models in real shapes, LoRAs for them, and real models widened to cost more."""

from __future__ import annotations

import copy
from typing import Any

import torch
from inflated import deepen
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from genarm_fast import demo
from genarm_fast.cli.bench import QUESTIONS
from genarm_fast.demo.assets import NAME, is_complete
from genarm_fast.models.weights import share_weights
from genarm_fast.utils.records import cache_dir

from .settings import Setting

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_llama(setting: Setting, name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a Llama of a real shape with random weights. They are drawn on the device, never held by the host."""
    shape: dict[str, Any] = {"max_position_embeddings": 8192, "tie_word_embeddings": False}
    return _made(LlamaConfig(**(shape | setting.shapes[name] | changes)), setting, seed)


def _made(config: LlamaConfig, setting: Setting, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    with setting.device:
        model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype)
    return model.eval().requires_grad_(False)


def with_lora(base: PreTrainedModel, seed: int, rank: int) -> PeftModel:
    """Return the base, over the same weights, with a random LoRA on all linears of its layers."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS, init_lora_weights=False)
    adapted = get_peft_model(share_weights(base), config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            # Larger LoRAs in thirty layers would make the model draw the same token after any text.
            parameter.data.mul_(0.1)
    return adapted.eval().requires_grad_(False)


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights that a step has to read.

    An embedding does not count, since a step looks up single rows of it, unless it is the output layer as well.
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    embedding = 0 if tied else model.get_input_embeddings().weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - embedding


def plain_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a word for each token id. Prompts are token ids, but answers need a text."""
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(tokens)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="t0", eos_token="t1")


def widened(model: PreTrainedModel, parameters: float, copies: int, setting: Setting) -> PreTrainedModel:
    """Return a Llama with about `parameters` parameters that computes the same function as `model`, up to rounding.

    The wide residual stream holds `copies` copies of the small stream, so its norms see the same mean. `copies` is a
    power of two, so the linears that read the stream divide their weights by it exactly. The linears that write the
    stream write all copies. Added heads and inner columns are random; the linears after them read them with zeros.

    Raises:
        ValueError: another family, copies that are no power of two, or fewer parameters than the copies need.
    """
    small = model.config
    if small.model_type != "llama" or copies & (copies - 1):
        raise ValueError(f"model_type={small.model_type}, copies={copies}: expected a llama and a power of two")
    hidden, inner, width = small.hidden_size * copies, small.intermediate_size, small.head_dim
    heads, kv_heads = small.num_attention_heads * copies, small.num_key_value_heads * copies
    attention = 2 * hidden * width * (heads + kv_heads)
    rest = (parameters - small.vocab_size * hidden) / small.num_hidden_layers - attention
    wanted = round(rest / (3 * hidden))
    if wanted < inner:
        raise ValueError(f"parameters={parameters:g}: expected more with {copies} copies")
    inner = wanted if wanted < 4096 else wanted // 256 * 256  # a multiple that suits the tiles of matrix products
    config = copy.deepcopy(small)
    config.update({"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads})
    config.update({"num_key_value_heads": kv_heads, "tie_word_embeddings": True, "head_dim": width})
    wide = _made(config, setting, seed=0)
    with torch.no_grad():
        pairs = zip(wide.model.layers, model.model.layers)
        for large, layer in pairs:
            for name in ("input_layernorm", "post_attention_layernorm"):
                _copy(getattr(large, name), getattr(layer, name).weight.repeat(copies))
            for linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
                weight = layer.get_submodule(linear).weight
                large.get_submodule(linear).weight[: len(weight)] = (_on(weight, wide) / copies).repeat(1, copies)
            for linear in ("self_attn.o_proj", "mlp.down_proj"):
                weight = layer.get_submodule(linear).weight
                target = large.get_submodule(linear).weight.zero_()
                target[:, : weight.shape[1]] = _on(weight, wide).repeat(copies, 1)
        _copy(wide.model.embed_tokens, _on(model.model.embed_tokens.weight, wide).repeat(1, copies))
        # The tied head adds up all copies, so the norm before it divides by their number.
        _copy(wide.model.norm, model.model.norm.weight.repeat(copies) / copies)
    wide.generation_config = copy.deepcopy(model.generation_config)
    return wide


def _copy(module: nn.Module, values: Tensor) -> None:
    module.weight.copy_(values)  # type: ignore[operator, union-attr]


def _on(values: Tensor, model: PreTrainedModel) -> Tensor:
    return values.to(model.device, model.dtype)


class Pair:
    """A small base, an ARM for it, a tokenizer, prompts as token ids, and the name of the pair.

    The pair is SmolLM2 and SmolLM2 with `positive` merged into it, if the demo's base is cached: nothing is downloaded.
    Otherwise a stand-in replaces them: the ARM `small`, deepened to 30 layers (in a trial a random model), and a copy
    with noise in its weights. The acceptance of a stand-in's drafts says nothing about real models.
    """

    def __init__(self, setting: Setting) -> None:
        folder = cache_dir() / NAME
        if setting.name == "dry":
            toy = {"num_hidden_layers": 1, "intermediate_size": 48, "tie_word_embeddings": True}
            self.base = random_llama(setting, "8b", 3, initializer_range=0.3, **toy)
            self.name, self.real = "random", False
        elif is_complete(folder):
            load: Any = {"dtype": torch.float32}
            self.base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **load).eval()
            merged: Any = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **load), str(demo.arm("positive"))
            )
            self.arm = merged.merge_and_unload().eval()
            self.name, self.real, self.folder = "SmolLM2-135M-Instruct + positive", True, folder
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            chats = [[{"role": "user", "content": question}] for question in QUESTIONS[:8]]
            texts = [self.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
            self.prompts = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return
        else:
            small = AutoModelForCausalLM.from_pretrained(
                demo.arm("small"), trust_remote_code=False, dtype=torch.float32
            )
            self.base = deepen(small, 30).eval()
            self.name, self.real = "stand-in: the ARM small and a noisy copy of it", False
        self.arm = copy.deepcopy(self.base)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.arm.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator) * parameter.std().item()
                parameter.data += 0.1 * noise.to(parameter)
        vocab = self.base.config.vocab_size
        self.tokenizer = plain_tokenizer(vocab)
        self.prompts = torch.randint(2, vocab, (8, 12), generator=generator).tolist()

    def widened(self, setting: Setting) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Return base and ARM, widened to the sizes of the setting."""
        large, small = setting.widened
        copies = (2, 1) if setting.name == "dry" else (8, 4) if self.real else (16, 8)
        return (
            widened(self.base, large, copies[0], setting),
            widened(self.arm, small, copies[1], setting),
        )
