"""Pairs as token ids: templates as in decoding, EOS, limits in tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from genarm_fast.text.transcripts import transcript_messages
from genarm_fast.train import TrainConfig
from genarm_fast.train.data import Pair
from genarm_fast.train.encode import Encoder

HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why\n\nAssistant:"


def encoder(tokenizer: PreTrainedTokenizerFast, stop_ids: frozenset[int] = frozenset(), **options: Any) -> Encoder:
    return Encoder(tokenizer, TrainConfig(base="b", data="d", output="o", **options), stop_ids)


def texts(tokenizer: PreTrainedTokenizerFast, pair: Pair, **options: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids in encoder(tokenizer, **options).encode(pair)]


def test_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert texts(tokenizer, Pair(0, "the {x}", " cat", " mat")) == ["the {x}", " cat</s>", " mat</s>"]


def test_prompt_template(tokenizer: PreTrainedTokenizerFast) -> None:
    found = texts(tokenizer, Pair(0, "a {b} {prompt}", "c", "d"), prompt_template="Q: {prompt} A:")
    assert found[0] == "Q: a {b} {prompt} A:"


def test_bos_is_added_once(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    pair = Pair(0, "the", "cat", "mat")
    assert texts(bos_tokenizer, pair) == ["<s>the", "cat</s>", "mat</s>"]
    assert texts(bos_tokenizer, pair, prompt_template="<s>{prompt}")[0] == "<s>the"
    assert (
        texts(bos_tokenizer, Pair(0, [{"role": "user", "content": "the"}], "c", "d"))[0]
        == "<s>[user] the</s>[assistant] "
    )


def test_chat(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert texts(tokenizer, Pair(0, messages, "yes", "no")) == ["<s>[user] hi</s>[assistant] ", "yes</s>", "no</s>"]
    assert texts(tokenizer, Pair(0, "hi", " yes", "no"), as_chat=True) == [
        "<s>[user] hi</s>[assistant] ",
        " yes</s>",
        "no</s>",
    ]
    own = "{% for m in messages %}({{ m.content }}){% endfor %}"
    assert texts(tokenizer, Pair(0, messages, "yes", "no"), chat_template=own)[0] == "(hi)"


def test_transcript(tokenizer: PreTrainedTokenizerFast) -> None:
    """A transcript is encoded raw, or as chat messages, whose responses start without the transcript's space."""
    pair = Pair(0, HH, " yes", " no")
    assert texts(tokenizer, pair) == [HH, " yes</s>", " no</s>"]
    chat = "<s>[user] hi</s>[assistant] hello</s>[user] why</s>[assistant] "
    assert texts(tokenizer, pair, as_chat=True) == [chat, "yes</s>", "no</s>"]
    assert [m["role"] for m in transcript_messages(HH)] == ["user", "assistant", "user"]
    assert transcript_messages("no transcript") == []


def test_end_of_turn_is_the_templates_own(tokenizer: PreTrainedTokenizerFast) -> None:
    """Llama 3's answers end with <|eot_id|>, which is a stop token but not the tokenizer's EOS."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = (other.chat_template or "").replace("{{ eos_token }}", "~")  # type: ignore[union-attr]
    end = other("~")["input_ids"][0]
    pair = Pair(0, [{"role": "user", "content": "hi"}], "yes", "no")
    assert encoder(other, frozenset({1, end})).encode(pair)[1][-1] == end
    assert encoder(other, frozenset({1})).encode(pair)[1][-1] == other.eos_token_id
    assert encoder(other, frozenset({1, end})).encode(Pair(0, "hi", "yes", "no"))[1][-1] == other.eos_token_id


def test_incomplete_responses_get_no_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert texts(tokenizer, Pair(0, "the", "cat", "mat", chosen_complete=False)) == ["the", "cat", "mat</s>"]


def test_an_eos_in_the_text_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = Pair(0, "the", "cat</s>", "mat")
    found = [encoder(tokenizer).encode(pair)[1:], encoder(tokenizer, as_chat=True).encode(pair)[1:]]
    for chosen, rejected in found:
        assert (tokenizer.decode(chosen), tokenizer.decode(rejected)) == ("cat</s>", "mat</s>")


def test_limits(tokenizer: PreTrainedTokenizerFast) -> None:
    """A response of exactly the limit, EOS included, stays; one more token drops the pair."""
    pairs = [Pair(0, "qqqq", "xxx", "x"), Pair(1, "qqqq", "x", "xxxx"), Pair(2, "qqqqq", "x", "xx")]
    kept, dropped = encoder(tokenizer, max_prompt_tokens=4, max_response_tokens=4)(pairs, "d")
    assert [pair.row for pair in kept] == [0]
    assert dropped == {"response too long": 1, "prompt too long": 1}
    assert kept[0].chosen[-1] == tokenizer.eos_token_id


def test_long_prompts_can_lose_their_start(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    cut = encoder(bos_tokenizer, max_prompt_tokens=4, long_prompts="truncate")
    kept, counts = cut([Pair(0, "vwxyz", "a", "b"), Pair(1, "xyz", "a", "b")], "d")
    assert [bos_tokenizer.decode(pair.prompt) for pair in kept] == ["<s>xyz", "<s>xyz"]
    assert counts == {"prompt truncated, kept": 1}


def test_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="d line 8: the prompt has no tokens"):
        encoder(tokenizer)([Pair(7, "", "a", "b", line=8)], "d")
    refuses = "{{ raise_exception('no system role') }}"
    for template, message in ((refuses, "no system role"), ("{{ oops", "unexpected end of template")):
        with pytest.raises(ValueError, match=f"d line 3: the chat template can't render the prompt: {message}"):
            encoder(tokenizer, as_chat=True, chat_template=template)([Pair(2, "hi", "a", "b", line=3)], "d")
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="as_chat=True: expected a tokenizer with a chat template"):
        encoder(bare, as_chat=True)
    with pytest.raises(ValueError, match="the data has chat messages: expected a tokenizer with a chat template"):
        encoder(bare).encode(Pair(0, [{"role": "user", "content": "hi"}], "a", "b"))
    bare.eos_token = None
    with pytest.raises(ValueError, match="expected a tokenizer with an EOS token"):
        encoder(bare)


TOOLS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<t>{{ m.reasoning_content }}</t>{% endif %}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}<c>{{ call.function.name }}</c>{% endfor %}</s>"
    "{% endfor %}{% if tools %}{{ tools | length }}{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALL = {"type": "function", "function": {"name": "look"}}


def test_all_of_a_message_is_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    prompt.append({"role": "tool", "content": "cat"})
    thought = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    found = texts(tokenizer, Pair(0, prompt, thought, call), chat_template=TOOLS)
    assert found == [
        "[user]hi</s>[assistant]<c>look</c></s>[tool]cat</s>[assistant]",
        "<t>hm</t>yes</s>",
        "<c>look</c></s>",
    ]
    # The test tokenizer's own template renders neither reasoning nor tool calls.
    kept, dropped = encoder(tokenizer)([Pair(0, prompt, "yes", "no"), Pair(1, prompt[:1], thought, "no")], "d")
    assert not kept
    assert dropped == {
        "the chat template leaves out 'tool_calls'": 1,
        "the chat template leaves out 'reasoning_content'": 1,
    }


def test_tools_that_a_template_leaves_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """Decoding refuses a prompt with such tools, so no such pair is trained on. Null fields of tools stay null."""
    tool = {"type": "function", "function": {"name": "look", "description": None}}
    user = [{"role": "user", "content": "hi"}]
    pairs = [Pair(0, user, "a", "b", options={"tools": [tool]}), Pair(1, user, "a", "b")]
    kept, dropped = encoder(tokenizer)(pairs, "d")
    assert [pair.row for pair in kept] == [1]
    assert dropped == {"the chat template leaves out 'tools'": 1}
    shows = "{{ tools | tojson }}" + TOOLS
    assert '"description": null' in texts(tokenizer, pairs[0], chat_template=shows)[0]


def test_prompts_that_end_with_the_assistants_message(tokenizer: PreTrainedTokenizerFast) -> None:
    """Decoding continues that message. A response that first ends it could never be drawn, as the end stops the
    text."""
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I"}]
    kept, dropped = encoder(tokenizer)([Pair(0, begun, " am", " was"), Pair(1, begun[:1], "a", "b")], "d")
    assert [pair.row for pair in kept] == [1]
    assert dropped == {"prompt that ends with the assistant's message, which decoding would continue": 1}


def test_what_a_template_changes_of_an_answer_is_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    trims = TOOLS.replace("m.content or ''", "(m.content or '') | trim")
    pair = Pair(0, [{"role": "user", "content": "hi"}], " yes ", "no", rejected_complete=False)
    assert texts(tokenizer, pair, chat_template=trims)[1:] == ["yes</s>", "no"]
    kept, dropped = encoder(tokenizer, chat_template=trims)([Pair(0, pair.prompt, " yes", "yes ")], "d")
    assert (kept, dropped) == ([], {"chosen equals rejected": 1})


def test_transcripts_that_cannot_be_read_are_dropped_from_chats(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [Pair(0, "\n\nHuman: hi", "a", "b"), Pair(1, "x\n\nAssistant: y", "a", "b"), Pair(2, "hi", "a", "b")]
    kept, dropped = encoder(tokenizer, as_chat=True)(pairs, "d")
    assert [pair.row for pair in kept] == [2]
    assert dropped == {"transcript that does not end where the assistant begins": 2}
