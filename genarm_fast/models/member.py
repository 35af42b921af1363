"""Members of a guided decoder: the base and its ARMs, each with a model, a tokenizer and prompt templates."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from genarm_fast.models.fast_modules import as_runner
from genarm_fast.models.hub import Source, find_file, read_json
from genarm_fast.models.loader import Backbones, share_weights
from genarm_fast.models.lora_lanes import share_forwards
from genarm_fast.models.rebound import WeightWatch
from genarm_fast.params import check_weights
from genarm_fast.text.templates import default_template

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
RESERVED = ("base", "ngram", "draft_model")  # other drafters than ARMs
CACHED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class ARM:
    """An autoregressive reward model: a causal LM whose log-probability of a token is the token's reward.

    Args:
        model: hub id, local folder, folder of a PEFT adapter, or a loaded model (never modified; used in eval mode).
        weight: default weight, the paper's 1/β; any finite real. A request's `weights` override it.
        name: key of its rewards; default: the last part of its path.
        prompt_template: wraps raw string prompts, e.g. "<|user|>\\n{prompt}\\n<|assistant|>\\n".
        chat_template: Jinja template for chat messages; default: the one of its tokenizer.

    Templates default to those that training recorded in the folder's genarm.json. An ARM without tokenizer files takes
    the base's tokenizer and chat template.
    """

    model: Source | nn.Module
    weight: float = field(default=1.0, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    prompt_template: str | None = field(default=None, kw_only=True)
    chat_template: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.model, (str, os.PathLike, nn.Module)):
            raise TypeError(f"model={self.model!r}: expected a hub id, a folder or a loaded model")
        if not isinstance(check_weights(self.weight), float):
            raise TypeError(f"weight={self.weight!r}: expected one number")
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"name={self.name!r}: expected a string")


@dataclass
class Member:
    """A loaded member. `weight` is the ARM's default weight. given: somebody else has its model, and may change it.
    chat: whether it was trained on chat messages; None: nobody recorded that."""

    name: str
    model: Any  # a transformers causal LM in eval mode
    tokenizer: PreTrainedTokenizerBase
    prompt_template: str | None = None
    chat_template: str | None = None
    weight: float = 1.0
    given: bool = False
    chat: bool | None = None
    watch: WeightWatch | None = None  # of a given model

    def __post_init__(self) -> None:
        config = self.model.config
        text = config.get_text_config()
        unsupported = set(getattr(text, "layer_types", None) or ()) - CACHED_LAYERS
        if config.is_encoder_decoder or getattr(self.model, "_is_stateful", False) or unsupported:
            what = ", ".join(sorted(unsupported)) or "recurrent or encoder-decoder"
        elif not getattr(self.model, "_supports_attention_backend", False) or not takes_positions(self.model):
            what = "with attention code of their own"
        else:
            what = ""
        if what:
            raise ValueError(
                f"{self.name}: {config.model_type} models ({what}) are not supported: expected plain attention"
            )
        for name, template in (("prompt_template", self.prompt_template), ("chat_template", self.chat_template)):
            if template is not None and not isinstance(template, str):
                raise TypeError(f"{self.name}: {name}={template!r}: expected a string")
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"{self.name}: prompt_template={self.prompt_template!r}: expected a text with {{prompt}} in it"
            )
        self.vocab_size: int = text.vocab_size  # width of the logits
        self.context = context_of(text)
        self.shared = self.model  # runs it together with the other members that have the same one: see lanes.py
        self.lane = 0

    @cached_property
    def runner(self) -> Any:
        """A copy of the module tree, over the same weights, that runs it alone over our cache."""
        return as_runner(share_weights(self.model))

    @property
    def device(self) -> torch.device:
        """Where its token ids go."""
        return self.model.get_input_embeddings().weight.device


def load_members(
    base: Source | nn.Module,
    specs: Sequence[ARM],
    draft_model: Source | nn.Module | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt_template: str | None = None,
    chat_template: str | None = None,
    **backbone_kwargs: Any,
) -> tuple[list[Member], Member | None]:
    """Base first, then the ARMs in order; and the model that only proposes tokens.

    Raises:
        ValueError: tokenizers that disagree on the common vocabulary, an adapter of another base, a model without a
            key-value cache, a template without {prompt}, a name given twice, a device that is not here.
        FileNotFoundError: one of them is nowhere; before any is loaded.
    """
    names = arm_names(specs)
    backbones = Backbones(**backbone_kwargs)
    roles = ["base", *(f"arms[{index}]" for index in range(len(specs))), "draft_model"]
    places = [
        None if source is None or isinstance(source, nn.Module) else backbones.locate(role, source)
        for role, source in zip(roles, [base, *(spec.model for spec in specs), draft_model])
    ]
    model = backbones.load("base", base)
    source = getattr(model.config, "_name_or_path", "") if isinstance(base, nn.Module) else base
    if isinstance(base, nn.Module) and not hasattr(model, "peft_config"):
        backbones.adopt(str(source) or "the given base", model)
    recorded = {} if places[0] is None else read_json(places[0], "genarm.json")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer={tokenizer!r}: expected a loaded tokenizer")
    base_tokenizer = tokenizer
    if tokenizer is None and source:
        with suppress(FileNotFoundError):  # a given model may come from anywhere
            base_tokenizer = load_tokenizer(backbones.locate("base", source))
    if base_tokenizer is None:
        raise ValueError(f"tokenizer=None: expected a tokenizer, since the base {source!r} has no tokenizer files")
    first = Member(
        "base",
        model,
        base_tokenizer,
        prompt_template or recorded.get("prompt_template"),
        chat_template or recorded.get("chat_template") or default_template(base_tokenizer),
        given=isinstance(base, nn.Module),
        watch=watch_of(base),
    )
    members = [first]
    for role, name, spec, place in zip(roles[1:], names, specs, places[1:]):
        recorded = {} if place is None else read_json(place, "genarm.json")
        own = None if place is None else load_tokenizer(place)
        members.append(
            Member(
                name,
                backbones.load(role, spec.model),
                own or base_tokenizer,
                spec.prompt_template or recorded.get("prompt_template"),
                spec.chat_template
                or recorded.get("chat_template")
                or (default_template(own) if own else None)
                or first.chat_template,
                float(spec.weight),
                isinstance(spec.model, nn.Module),
                recorded.get("chat"),
                watch_of(spec.model),
            )
        )
    for lane, (member, shared) in enumerate(zip(members, share_forwards([member.model for member in members]))):
        member.lane = lane
        if shared is not member.model:
            member.shared = as_runner(shared)
    if draft_model is None:
        return members, None
    own = None if places[-1] is None else load_tokenizer(places[-1])  # it sees the base's prompts all the same
    model = Backbones(**backbone_kwargs).load("draft_model", draft_model)
    return members, Member("draft_model", model, own or base_tokenizer, watch=watch_of(draft_model))


def watch_of(source: Source | nn.Module | None) -> WeightWatch | None:
    """What notices that the owner of a given model bound its weights to other memory."""
    return WeightWatch(source) if isinstance(source, nn.Module) else None


def context_of(config: Any) -> int | None:
    """Positions that a text config gives a sense to. LongRoPE turns all of a sequence otherwise once it is longer than
    the original context, what is cached of it too, so it ends there."""
    ropes = getattr(config, "rope_parameters", None) or {}
    originals = [
        rope["original_max_position_embeddings"]
        for rope in (ropes, *ropes.values())  # of all layers, or of each kind
        if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope"
    ]
    return min(
        [getattr(config, "max_position_embeddings", None), *originals], default=None, key=lambda each: each or inf
    )


def takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(type(model).forward).parameters


def as_arms(arms: Any) -> list[ARM]:
    """ARM specifications from one or several specifications, paths or models."""
    if isinstance(arms, (ARM, str, os.PathLike, nn.Module)):
        arms = [arms]
    if not isinstance(arms, Sequence):
        raise TypeError(f"arms={arms!r}: expected an ARM, a hub id, a folder, a loaded model, or a list of such")
    return [arm if isinstance(arm, ARM) else ARM(arm) for arm in arms]


def arm_names(specs: Sequence[ARM]) -> list[str]:
    """Unique names: given ones as they are, default ones numbered where they repeat."""
    given = [spec.name for spec in specs if spec.name is not None]
    for name in given:
        if given.count(name) > 1 or not name:
            raise ValueError(f"name={name!r}: expected a non-empty name for each ARM, none twice")
        if name in RESERVED:
            raise ValueError(f"name={name!r}: expected another one than {', '.join(RESERVED)}, which name drafters")
    names: list[str] = []
    for spec in specs:
        stem = "arm" if isinstance(spec.model, nn.Module) else Path(spec.model).name or "arm"
        name, number = spec.name or stem, 2
        while spec.name is None and name in (*names, *given, *RESERVED):
            name, number = f"{stem}{number}", number + 1
        names.append(name)
    return names


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or hub repository, None where it has no tokenizer files."""
    if any(find_file(source, name) for name in TOKENIZER_FILES):
        return AutoTokenizer.from_pretrained(source)
    return None


def common_vocabulary(members: Sequence[Member]) -> int:
    """Number of token ids that all members share: narrower of all logits and tokenizers.

    Raises:
        ValueError: two tokenizers disagree on one of them.
    """
    tokenizers = {id(member.tokenizer): member for member in members}
    tokens = {
        key: {i: token for token, i in member.tokenizer.get_vocab().items()} for key, member in tokenizers.items()
    }
    size = min(*(member.vocab_size for member in members), *(max(table) + 1 for table in tokens.values()))
    expected = tokens[id(members[0].tokenizer)]
    for key, member in tokenizers.items():
        for i in range(size):
            if tokens[key].get(i) != expected.get(i):
                raise ValueError(
                    f"{member.name}: its tokenizer disagrees with the base's at token id {i} of the {size} in common:"
                    f" got {tokens[key].get(i)!r}, expected {expected.get(i)!r}"
                )
    return size


def end_of_sequence(base: Member, vocab_size: int) -> frozenset[int]:
    """Token ids that end a response: the base's generation config, else its config, else its tokenizer."""
    generation_config = getattr(base.model, "generation_config", None)
    candidates: tuple[int | list[int] | None, ...] = (
        getattr(generation_config, "eos_token_id", None),
        base.model.config.get_text_config().eos_token_id,
        base.tokenizer.eos_token_id,
    )
    eos = next((value for value in candidates if value is not None), [])
    ids = frozenset([eos] if isinstance(eos, int) else eos)
    if not any(token_id < vocab_size for token_id in ids):
        warnings.warn(f"end-of-sequence ids {sorted(ids)} of the base: expected one below {vocab_size}", stacklevel=2)
    return ids
