"""Load the members of a guided decoder: their models, tokenizers and prompt templates."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from genarm_fast.models.arm import ARM, active_adapters, arm_names
from genarm_fast.models.checkpoint import ModelLoader
from genarm_fast.models.fast_modules import make_fast
from genarm_fast.models.files import TOKENIZER_FILES, blame_tokenizer, check_files, read_object, refusing
from genarm_fast.models.hub import Source, find_file, hub_options
from genarm_fast.models.known_decoders import built_as_known
from genarm_fast.models.lora_lanes import share_forwards
from genarm_fast.models.member import Member
from genarm_fast.models.one_load import one_load
from genarm_fast.models.rebound import WeightWatch
from genarm_fast.text.chats import template_arguments
from genarm_fast.text.prompts import PromptFormat
from genarm_fast.text.templates import default_template
from genarm_fast.utils.checks import check_flag, shown

log = logging.getLogger(__name__)
RECORDED_TYPES = {
    "prompt_template": (str, type(None)),
    "chat_template": (str, type(None)),
    "prompt_format": (str, type(None)),
    "end_token_id": (int, type(None)),
    "chat_template_kwargs": (dict, type(None)),
}


@one_load()
def load_members(
    base: Source | nn.Module,
    specs: Sequence[ARM],
    draft_model: Source | nn.Module | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt_template: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    **loading: Any,
) -> tuple[list[Member], Member | None]:
    """Load the members, base first and then the ARMs in order, and the draft model, a model that only proposes tokens.

    trust_remote_code: for the base and the draft model; each `ARM` has its own setting. loading: keyword arguments for
    `ModelLoader`.

    Raises:
        ValueError: a folder or adapter that is incomplete or not supported, an adapter of another base, a model without
            a key-value cache, tokenizers that disagree on the common vocabulary, a template without {prompt}, a name
            given twice, a device that is not here, one adapted model in two roles.
        FileNotFoundError: a model that is found nowhere; raised before any model is loaded.
    """
    names = arm_names(specs)
    models = ModelLoader(**loading)
    roles = ["base", *(f"arms[{index}]" for index in range(len(specs))), "draft_model"]
    locations = [
        None if source is None or isinstance(source, nn.Module) else models.locate(role, source)
        for role, source in zip(roles, [base, *(spec.model for spec in specs), draft_model])
    ]
    trust_remote_code = check_flag("trust_remote_code", trust_remote_code)
    for role, spec in zip(roles[1:], specs):
        if (now := active_adapters(spec.model)) != spec.active:
            raise ValueError(
                f"{role}: its active adapter was {', '.join(spec.active)} when the ARM was made and is {', '.join(now)}"
                " now: expected a model of its own for each adapter, or the adapters' folders"
            )
    model = models.load("base", base, trust_remote_code=trust_remote_code)
    source = getattr(model.config, "_name_or_path", "") if isinstance(base, nn.Module) else base
    if isinstance(base, nn.Module) and not hasattr(model, "peft_config"):
        models.register_given(str(source) or "the given base", model)
    recorded = _recorded("base", locations[0])
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer={shown(tokenizer)}: expected a loaded tokenizer, as of AutoTokenizer")
    base_tokenizer = tokenizer
    if tokenizer is None and source:
        with suppress(FileNotFoundError):  # a loaded model may name a folder that does not exist here
            found = models.locate("base", source)
            base_tokenizer = _tokenizer_of("base", source, models, trust_remote_code)
            gguf = loading.get("gguf_file")
            if base_tokenizer is None and gguf is not None:
                with refusing(f"base: {gguf}", "a GGUF file whose tokenizer can be read"):
                    base_tokenizer = AutoTokenizer.from_pretrained(
                        str(found), gguf_file=gguf, trust_remote_code=trust_remote_code, **hub_options(found)
                    )
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
    for role, name, spec, location in zip(roles[1:], names, specs, locations[1:]):
        recorded = _recorded(role, location)
        _check_format(role, spec, recorded.get("prompt_format"))
        own = None if location is None else _tokenizer_of(role, spec.model, models, spec.trust_remote_code)
        members.append(
            Member(
                name,
                models.load(
                    role,
                    spec.model,
                    base=spec.base,
                    trust_remote_code=spec.trust_remote_code,
                    quantization=spec.quantization,
                ),
                own or base_tokenizer,
                spec.prompt_template or recorded.get("prompt_template"),
                spec.chat_template
                or recorded.get("chat_template")
                or (default_template(own) if own else None)
                or first.chat_template,
                float(spec.weight),
                isinstance(spec.model, nn.Module),
                recorded.get("prompt_format"),
                recorded.get("chat_template_kwargs") or {},
            )
        )
        if (end := recorded.get("end_token_id")) is not None:
            if end >= first.vocab_size:
                raise ValueError(
                    f"{role}: {Path(location or '', 'genarm.json')}: end_token_id={end}: expected a token of the base, "
                    f"less than {first.vocab_size}"
                )
            first.stop_ids |= {end}
    drafter = None
    if draft_model is not None:
        # The draft model gets the base's prompts, whether or not it has a tokenizer of its own.
        own = None if locations[-1] is None else _tokenizer_of("draft_model", draft_model, models, trust_remote_code)
        model = ModelLoader(**loading).load("draft_model", draft_model, trust_remote_code=trust_remote_code)
        drafter = Member("draft_model", model, own or base_tokenizer)
    _make_runners(members, drafter)
    everyone = zip([*members, drafter], [base, *(spec.model for spec in specs), draft_model])
    # The watch is made after the runners, because making a runner on a GPU moves weights.
    for member, source in everyone:
        if member is not None and isinstance(source, nn.Module):
            member.watch = WeightWatch(source)
    return members, drafter


def _make_runners(members: list[Member], drafter: Member | None) -> None:
    """Make the module trees that run the members. Members that share a forward get one tree together."""
    models = [member.model for member in members]
    made: dict[int, Any] = {}
    for lane, (member, shared) in enumerate(zip(members, share_forwards(models, built_as_known))):
        member.lane, member.shared, member.relatives = lane, shared, models
        if shared is not member.model and id(shared) not in made:
            made[id(shared)] = make_fast(shared, models)
    everyone = [*members, *([] if drafter is None else [drafter])]
    for member in everyone:
        # Reading `runs_by` makes the member's runner. That happens here, because making a runner on a GPU can move
        # weights.
        log.info("%s: %s", member.name, member.runs_by)
    _warn_of_float16(everyone)


def _warn_of_float16(members: Iterable[Any]) -> None:
    """Log the members in float16 on a CPU, in one warning.

    With a LoRA ARM, SmolLM2-135M generates 10 tokens a second in float16, 27 in float32 and 53 in bfloat16
    (`genarm-fast bench --base demo --arm demo:positive --batch 1 --new-tokens 32 --rounds 1 --dtype float16`, one
    thread of an AMD EPYC with AVX-512, 2026-11-29, with other work on the machine).
    """
    slow = [each.name for each in members if each.model.dtype == torch.float16 and each.device.type == "cpu"]
    if slow:
        log.warning(
            "%s: float16 is slow on a CPU, prompts above all: expected dtype='bfloat16', which is several times as fast"
            " and rounds the weights, or dtype='float32', which holds them as they are",
            ", ".join(slow),
        )


def _recorded(member: str, location: Source | None) -> dict[str, Any]:
    """Return what training recorded in genarm.json, or {} without such a file.

    Raises:
        ValueError: a value that training never writes.
    """
    recorded = {} if location is None else read_object(member, location, "genarm.json")
    for name, kinds in RECORDED_TYPES.items():
        value = recorded.get(name)
        known = isinstance(value, kinds) and not isinstance(value, bool)
        if name == "prompt_format":
            known = known and value in (None, *get_args(PromptFormat))
        elif name == "end_token_id":
            known = known and (value is None or value >= 0)
        elif name == "chat_template_kwargs" and known:
            with refusing(f"{member}: {Path(location or '', 'genarm.json')}", "what training records"):
                template_arguments(None, value)
        if not known:
            file = Path(location or "", "genarm.json")
            raise ValueError(f"{member}: {file}: {name}={recorded[name]!r:.60}: expected what training records")
    return recorded


def _tokenizer_of(member: str, source: Any, models: ModelLoader, trust: bool) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer beside the model, else the one beside the subfolder that the model is in, else None.

    The errors are those of `load_tokenizer`.
    """
    for location in models.tokenizer_locations(member, source):
        if (found := load_tokenizer(member, location, trust_remote_code=trust)) is not None:
            return found
    return None


def load_tokenizer(member: str, source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a folder or hub repository; return None if it has no tokenizer files.

    Raises:
        ValueError: files that hold no tokenizer, or a tokenizer that needs the folder's own Python code.
    """
    if not any(find_file(source, name) for name in TOKENIZER_FILES):
        return None
    check_files(member, source)
    expected = "a tokenizer that can be loaded"
    try:
        with refusing(f"{member}={os.fspath(source)!r}", expected):
            return AutoTokenizer.from_pretrained(
                str(source), trust_remote_code=trust_remote_code, **hub_options(source)
            )
    except ValueError as error:
        if not os.path.isdir(source) or error.__cause__ is None:
            raise
        # transformers reads this file before the tokenizer's, so its fault is named first.
        if find_file(source, "config.json"):
            with refusing(f"{member}: {Path(source, 'config.json')}", "a config that can be read"):
                AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with refusing(f"{member}: {blame_tokenizer(member, Path(source))}", expected):
            raise error.__cause__ from None


def _check_format(member: str, spec: ARM, trained_on: str | None) -> None:
    """Raises ValueError for a kind of template that the ARM was not trained with."""
    for name, formats in (("prompt_template", ("transcript", "chat")), ("chat_template", ("transcript", "text"))):
        if getattr(spec, name) is not None and trained_on in formats:
            raise ValueError(
                f"{member}: {name}={getattr(spec, name)!r:.60}: expected none, it was trained on {trained_on}s"
            )
