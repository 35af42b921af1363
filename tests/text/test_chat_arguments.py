"""Tools and chat-template arguments reach every member's template, wherever a prompt is taken, or are refused."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
from transformers import PreTrainedTokenizerBase

from genarm_fast import ARM, GenARM
from genarm_fast.jobs import read_requests
from genarm_fast.params import SamplingParams
from genarm_fast.text.chats import Chat
from genarm_fast.text.given import as_prompts

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "look"}}
BEGIN = (
    "{% if tools %}<{{ tools[0].function.name }}>{% endif %}"
    "{% if enable_thinking is defined %}<{{ enable_thinking }}>{% endif %}"
)
OBJECT = {"messages": USER, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def own(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = BEGIN + own.chat_template
    return own


@pytest.fixture(scope="module")
def steered(tiny_model, own):
    """A base and an ARM with the same tokenizer and different templates."""
    arm = ARM(tiny_model(seed=1), name="a", chat_template="arm" + str(own.chat_template))
    return GenARM.from_pretrained(tiny_model(), [arm], tokenizer=own)


def read(model, own, prompts, **options):
    """Return the texts that base and ARM read for the first prompt."""
    request = model.prepare(prompts, max_new_tokens=1, **options)[0]
    return [own.decode(ids) for ids in request.token_ids]


def test_every_member_reads_them(steered, own):
    expected = ["<look><False><s>[user] hi</s>[assistant] ", "arm<look><False><s>[user] hi</s>[assistant] "]
    options = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    assert read(steered, own, USER, **options) == expected
    assert read(steered, own, OBJECT) == read(steered, own, [OBJECT]) == expected
    assert read(steered, own, [USER, OBJECT], tools=None)[0] == "<s>[user] hi</s>[assistant] "
    # A prompt's own arguments take precedence over the call's.
    found = read(steered, own, [OBJECT], chat_template_kwargs={"enable_thinking": True})
    assert found == expected
    # The prompt equals transformers' rendering.
    ids = own.apply_chat_template(USER, tools=[TOOL], enable_thinking=False, add_generation_prompt=True)["input_ids"]
    assert own.decode(ids) == expected[0]


def test_text_and_rewards_follow(steered):
    """Generation and scores use the prompt with its tools and arguments; without them the scores differ."""
    output = steered.generate(OBJECT, seed=1, max_new_tokens=8)[0]
    plain, own = steered.score(USER, "yes")[0], steered.score(OBJECT, "yes")[0]
    assert plain.rewards["a"].total != own.rewards["a"].total
    with steered.stream(OBJECT, seed=1, max_new_tokens=8) as stream:
        assert "".join(chunk.text for chunk in stream) == output.text


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("hi", {"tools": [TOOL]}, r"prompts\[0\]: expected chat messages with 'tools', got text"),
        ([5, 6], {"chat_template_kwargs": {"x": 1}}, r"prompts\[0\]: expected chat messages with 'x'"),
        (USER, {"tools": "look"}, "tools='look': expected a list of tools"),
        (USER, {"tools": ""}, "tools='': expected a list of tools"),
        *(
            (USER, {"chat_template_kwargs": {name: 1}}, f"chat_template_kwargs='{name}': expected what only")
            for name in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
            if name != "kwargs"
        ),
        (USER, {"tools": [print]}, "tools=.*: expected a list of tools, each a mapping"),
        (USER, {"chat_template_kwargs": [1]}, r"chat_template_kwargs=\[1\]: expected a mapping"),
        (USER, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs='tokenize': expected what only"),
        ({"messages": USER, "tool": []}, {}, r"prompts\[0\]: 'tool': expected messages, tools, chat_template_kwargs"),
        ({"messages": "hi", "tools": [TOOL]}, {}, r"prompts\[0\]: messages='hi': expected a list of messages"),
        ({"messages": USER, "tools": 3}, {}, r"prompts\[0\]: tools=3: expected a list of tools"),
    ],
)
def test_errors(steered, prompts, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        steered.prepare(prompts, **options)


def test_members_that_cannot_read_them_refuse(tiny_model, own, tokenizer):
    base = GenARM.from_pretrained(tiny_model(), [], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[0\]: tools: .*'s chat template leaves them out"):
        base.prepare(USER, tools=[TOOL])
    base.prepare(USER, tools=[])
    text = GenARM.from_pretrained(tiny_model(), [ARM(tiny_model(seed=1), name="plain")], tokenizer=own)
    text.members[1].prompt_format = "text"
    with pytest.raises(ValueError, match=r"prompts\[0\]: tools: plain was trained on prompts of the format 'text'"):
        text.prepare(USER, tools=[TOOL])
    assert read(text, own, USER, chat_template_kwargs={"enable_thinking": True})[1] == "hi"


def test_batch_lines(tmp_path):
    """Lines of this project and of OpenAI take arguments; a resumed job distinguishes lines with other arguments."""
    lines = [{"prompt": USER, **options} for options in ({}, {"tools": [TOOL]}, {"chat_template_kwargs": {"a": 1}})]
    body = {"messages": USER, "chat_template_kwargs": {"a": 1}}
    lines.append({"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": body})
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_requests(path, SamplingParams(), arms=1)
    assert [getattr(each.prompt, "arguments", {}) for each in found] == [{}, {"tools": [TOOL]}, {"a": 1}, {"a": 1}]
    assert len({each.head("s")["request"] for each in found}) == 4
    path.write_text(json.dumps({"prompt": "hi", "tools": [TOOL]}) + "\n")
    with pytest.raises(ValueError, match=r"in.jsonl line 1: prompts\[0\]: expected chat messages with 'tools'"):
        read_requests(path, SamplingParams(), arms=1)


def test_a_parsed_prompt_keeps_them():
    (first,) = as_prompts(OBJECT)
    (again,) = as_prompts([first])
    assert isinstance(again, Chat)
    assert again == USER
    assert again.arguments == {"enable_thinking": False, "tools": [TOOL]}
