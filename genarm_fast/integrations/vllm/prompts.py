"""Check that all members read a prompt alike: in vLLM they get the same token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from genarm_fast.integrations.vllm.served import ServedARM
from genarm_fast.models.files import read_object, refusing
from genarm_fast.models.loader import load_tokenizer
from genarm_fast.text.chats import template_arguments
from genarm_fast.text.templates import default_template

PROBE = "The cat sat on the mat."  # a tokenizer that puts something before texts also puts it before this one


def shared_tokens(tokenizers: Sequence[PreTrainedTokenizerBase], widths: Sequence[int], names: Sequence[str]) -> int:
    """Return the number of token ids that all members share: the smallest size of logits and tokenizers.

    Raises:
        ValueError: two tokenizers disagree on one of these ids.
    """
    tables = [{i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in tokenizers]
    size = min(*widths, *(max(table) + 1 for table in tables))
    for name, table in zip(names[1:], tables[1:]):
        for i in range(size):
            if table.get(i) != tables[0].get(i):
                raise ValueError(
                    f"{name}: its tokenizer disagrees with the base's at token id {i} of the {size} in common: got"
                    f" {table.get(i)!r}, expected {tables[0].get(i)!r}"
                )
    return size


def member_tokenizers(base: Any, arms: Sequence[ServedARM]) -> list[PreTrainedTokenizerBase]:
    """Return the base's tokenizer, then one for each ARM: its own if its folder has one, else the base's.

    Raises:
        ValueError: an ARM that was trained on other token ids than the base's for the same prompt.
    """
    found = [base]
    for arm in arms:
        own = load_tokenizer(arm.name, arm.model, trust_remote_code=arm.trust_remote_code)
        recorded = read_object(arm.name, arm.model, "genarm.json")
        _check_recorded(arm.name, recorded, base)
        if own is not None:
            _check_alike(arm.name, own, base)
        found.append(own or base)
    return found


def load_base_tokenizer(source: str, *, trust_remote_code: bool, **options: Any) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def trained_arguments(arms: Sequence[ServedARM]) -> dict[str, Any]:
    """Return the chat template arguments that the ARMs were trained with, such as {"enable_thinking": False}.

    Raises:
        ValueError: two ARMs with different values of one argument, or a value that training never records.
    """
    found: dict[str, tuple[str, Any]] = {}
    for arm in arms:
        recorded = read_object(arm.name, arm.model, "genarm.json").get("chat_template_kwargs")
        with refusing(f"{arm.name}: chat_template_kwargs of its genarm.json", "what training records"):
            own = template_arguments(None, recorded)
        for name, value in own.items():
            if not name.isidentifier():
                raise ValueError(f"{arm.name}: chat_template_kwargs: {name!r:.60}: expected a name of a variable")
            first, other = found.setdefault(name, (arm.name, value))
            if other != value:
                raise ValueError(
                    f"{arm.name}: it was trained with {name}={value!r:.60} in its chat template, {first} with"
                    f" {other!r:.60}: expected the same, since in vLLM all members read the same prompt ids"
                )
    return {name: value for name, (_, value) in found.items()}


def pinned_template(template: str, trained: Mapping[str, Any]) -> str:
    """Return a chat template that sets these values, and raises for a request with other values."""
    lines = []
    for name, value in trained.items():
        literal = _jinja(value)
        message = _jinja(f"chat_template_kwargs: {name}: expected {value!r:.60}, with which the ARMs were trained")
        lines.append(
            f"{{%- if {name} is defined and {name} != {literal} %}}{{{{ raise_exception({message}) }}}}{{% endif -%}}"
            f"{{%- set {name} = {literal} -%}}"
        )
    return "".join(lines) + template


def _jinja(value: Any) -> str:
    """Return a value of JSON as a literal of Jinja."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_jinja(str(key))}: {_jinja(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_jinja, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _check_recorded(name: str, recorded: dict[str, Any], base: PreTrainedTokenizerBase) -> None:
    alone = "expected none, since in vLLM all members read the same prompt ids; genarm_fast's own engine takes it"
    if recorded.get("prompt_template") is not None:
        raise ValueError(f"{name}: it was trained with prompt_template={recorded['prompt_template']!r:.60}: {alone}")
    template = recorded.get("chat_template")
    if template is not None and template != default_template(base):
        raise ValueError(f"{name}: it was trained with a chat template of its own, {template!r:.60}: {alone}")
    if recorded.get("prompt_format") == "transcript":
        raise ValueError(f"{name}: it was trained on transcripts, not on the base's prompts: {alone}")


def _check_alike(name: str, own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> None:
    ids, expected = (list(tokenizer(PROBE)["input_ids"]) for tokenizer in (own, base))
    if ids != expected:
        raise ValueError(f"{name}: its tokenizer reads {PROBE!r} as {ids}: expected {expected}, as the base's does")
    template, theirs = default_template(own), default_template(base)
    if template is not None and theirs is not None and template != theirs:
        raise ValueError(
            f"{name}: its tokenizer has another chat template than the base's, {template!r:.60}: expected the same one"
            " or none, since in vLLM all members read the same prompt ids"
        )
