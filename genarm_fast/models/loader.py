"""Loading the members of a guided decoder: their models, tokenizers and prompt templates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from genarm_fast.models.arm import ARM, arm_names
from genarm_fast.models.checkpoint import ModelLoader
from genarm_fast.models.fast_modules import as_runner
from genarm_fast.models.hub import Source, find_file, read_json
from genarm_fast.models.lora_lanes import share_forwards
from genarm_fast.models.member import Member
from genarm_fast.models.rebound import WeightWatch
from genarm_fast.text.templates import default_template

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_members(
    base: Source | nn.Module,
    specs: Sequence[ARM],
    draft_model: Source | nn.Module | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt_template: str | None = None,
    chat_template: str | None = None,
    **loading: Any,
) -> tuple[list[Member], Member | None]:
    """Base first, then the ARMs in order; and the model that only proposes tokens.

    Raises:
        ValueError: tokenizers that disagree on the common vocabulary, an adapter of another base, a model without a
            key-value cache, a template without {prompt}, a name given twice, a device that is not here.
        FileNotFoundError: one of them is nowhere; before any is loaded.
    """
    names = arm_names(specs)
    models = ModelLoader(**loading)
    roles = ["base", *(f"arms[{index}]" for index in range(len(specs))), "draft_model"]
    places = [
        None if source is None or isinstance(source, nn.Module) else models.locate(role, source)
        for role, source in zip(roles, [base, *(spec.model for spec in specs), draft_model])
    ]
    model = models.load("base", base)
    source = getattr(model.config, "_name_or_path", "") if isinstance(base, nn.Module) else base
    if isinstance(base, nn.Module) and not hasattr(model, "peft_config"):
        models.adopt(str(source) or "the given base", model)
    recorded = {} if places[0] is None else read_json(places[0], "genarm.json")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer={tokenizer!r}: expected a loaded tokenizer")
    base_tokenizer = tokenizer
    if tokenizer is None and source:
        with suppress(FileNotFoundError):  # a given model may come from anywhere
            base_tokenizer = load_tokenizer(models.locate("base", source))
    if base_tokenizer is None:
        raise ValueError(f"tokenizer=None: expected a tokenizer, since the base {source!r} has no tokenizer files")
    first = Member(
        "base",
        model,
        base_tokenizer,
        prompt_template or recorded.get("prompt_template"),
        chat_template or recorded.get("chat_template") or default_template(base_tokenizer),
        given=isinstance(base, nn.Module),
    )
    members = [first]
    for role, name, spec, place in zip(roles[1:], names, specs, places[1:]):
        recorded = {} if place is None else read_json(place, "genarm.json")
        own = None if place is None else load_tokenizer(place)
        members.append(
            Member(
                name,
                models.load(role, spec.model),
                own or base_tokenizer,
                spec.prompt_template or recorded.get("prompt_template"),
                spec.chat_template
                or recorded.get("chat_template")
                or (default_template(own) if own else None)
                or first.chat_template,
                float(spec.weight),
                isinstance(spec.model, nn.Module),
                recorded.get("chat"),
            )
        )
    for member, given in zip(members, [base, *(spec.model for spec in specs)]):
        member.watch = WeightWatch(given) if isinstance(given, nn.Module) else None
    for lane, (member, shared) in enumerate(zip(members, share_forwards([member.model for member in members]))):
        member.lane = lane
        if shared is not member.model:
            member.shared = as_runner(shared)
    if draft_model is None:
        return members, None
    own = None if places[-1] is None else load_tokenizer(places[-1])  # it sees the base's prompts all the same
    model = ModelLoader(**loading).load("draft_model", draft_model)
    return members, Member("draft_model", model, own or base_tokenizer)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or hub repository, None where it has no tokenizer files."""
    if any(find_file(source, name) for name in TOKENIZER_FILES):
        return AutoTokenizer.from_pretrained(source)
    return None
