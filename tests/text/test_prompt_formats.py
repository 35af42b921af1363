"""Prompts in every form that users pass, in the format an ARM was trained on, joined to their responses."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import build_model, build_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from genarm_fast import ARM, GenARM
from genarm_fast.text.given import as_prompts
from genarm_fast.text.messages import UnsupportedContent, as_message
from genarm_fast.text.templates import Rendered, after_answer, end_of_answer, render, response_ids, token_ids
from genarm_fast.text.transcripts import as_transcript, transcript_messages

CHAT = [{"role": "user", "content": "the cat"}]
OPEN = "\n\nHuman: the cat\n\nAssistant:"


def pieces_tokenizer():
    """Return a tokenizer like SentencePiece's, which begins every text with "▁"."""
    pieces = [("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    pieces += [(each, -8.0) for each in "▁abcdefghijklmnopqrstuvwxyz"] + [
        ("▁the", -2.0),
        ("▁cat", -2.0),
        ("▁sat", -2.0),
    ]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_what_a_tokenizer_returns_is_a_prompt(tokenizer):
    ids = tokenizer("the cat")["input_ids"]
    for given in (tokenizer("the cat"), tokenizer("the cat", return_tensors="pt"), {"input_ids": torch.tensor(ids)}):
        assert as_prompts(given) == [ids]
        assert as_prompts([given, given]) == [ids, ids]
    padded = {"input_ids": [[0, 0, 7], [5, 6, 7]], "attention_mask": [[0, 0, 1], [1, 1, 1]]}
    assert as_prompts(padded) == [[7], [5, 6, 7]]


@pytest.mark.parametrize("mask", [[[1]], [[1, 1], [1, 1]], torch.ones(1, 1, 2, 2), 1, [["1", "1"]]])
def test_a_mask_of_another_shape_is_refused(mask):
    """Such a mask would cut the prompt off where the mask ends."""
    with pytest.raises(ValueError, match=r"attention_mask=.*: expected the shape of input_ids"):
        as_prompts({"input_ids": [[5, 6]], "attention_mask": mask})
    assert as_prompts({"input_ids": [[5, 6]], "attention_mask": [[False, True]]}) == [[6]]


def test_prompts_as_vllm_takes_them():
    assert as_prompts({"prompt": "the cat"}) == ["the cat"]
    assert as_prompts([{"prompt_token_ids": [5]}, {"prompt": "a", "prompt_token_ids": None}, "b"]) == [[5], "a", "b"]
    with pytest.raises(ValueError, match="prompts: 'multi_modal_data': expected prompt_token_ids or prompt alone"):
        as_prompts({"prompt": "a", "multi_modal_data": {"image": 1}})


@pytest.mark.parametrize("messages", ["hi", [5, 6], [], None, {"role": "user"}])
def test_a_chat_without_messages(messages):
    with pytest.raises(ValueError, match=r"prompts\[0\]: messages=.*: expected a list of messages"):
        as_prompts({"messages": messages, "tools": []})


def test_messages_are_kept_whole():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    assert as_message(message) == {"role": "assistant", "content": None, "tool_calls": [call]}
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    assert as_message({"role": "user", "content": parts, "id": 3}) == {"role": "user", "content": "the cat", "id": 3}
    with pytest.raises(UnsupportedContent, match="a content part of type 'image_url': expected text parts"):
        as_message({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]})
    with pytest.raises(TypeError, match="expected a string as 'content'"):
        as_message({"role": "user", "content": None})


def test_errors_show_little_of_long_prompts(model):
    for prompts in ([[1.5] * 10_000], {"x": list(range(10_000))}):
        with pytest.raises(TypeError) as caught:
            model.generate(prompts)
        assert len(str(caught.value)) < 250


def test_a_begun_answer_is_continued(model, tokenizer):
    begun = [*CHAT, {"role": "assistant", "content": "I am"}]
    text = tokenizer.decode(model.prepare([begun])[0].token_ids[0])
    assert text == "<s>[user] the cat</s>[assistant] I am"


@pytest.mark.parametrize("response", [" sat", " sat the", "xy", "\n sat"])
def test_a_response_has_the_tokens_of_the_joined_text(response):
    tokenizer = pieces_tokenizer()
    prompt = Rendered("the cat", True)
    ids = token_ids(tokenizer, prompt)
    joined = [*ids, *response_ids(tokenizer, prompt, ids, response)]
    assert joined == tokenizer("the cat" + response)["input_ids"]
    # The function gets only the ids of the prompt here, not its text.
    assert response_ids(tokenizer, None, ids, response) == joined[len(ids) :]


def test_a_border_inside_a_token(tokenizer):
    """The prompt's last letters and the response would join into other tokens, so the response is encoded by itself."""
    ids = token_ids(tokenizer, Rendered("the ma", True))
    assert tokenizer.decode(response_ids(tokenizer, Rendered("the ma", True), ids, "t")) == "t"


def test_transcripts():
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "o"},
    ]
    whole = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: o\n\nAssistant:"
    assert as_transcript(turns) == whole
    for text in (whole, whole.lstrip(), whole + " "):
        assert transcript_messages(text) == turns
    assert transcript_messages("Be kind." + whole) == [{"role": "system", "content": "Be kind."}, *turns]
    assert transcript_messages("\n\nHuman: hi") == transcript_messages("Assistant: hi") == []
    assert as_transcript("hi") == "\n\nHuman: hi\n\nAssistant:"
    with pytest.raises(ValueError, match="role 'system': expected user and assistant"):
        as_transcript([{"role": "system", "content": "x"}, *turns])


FORMATS = [
    ("text", "the cat", "the cat"),
    ("text", CHAT, "the cat"),
    ("transcript", "the cat", OPEN),
    ("transcript", CHAT, OPEN),
    ("transcript", OPEN, OPEN),
    ("chat", "the cat", "<s>[user] the cat</s>[assistant] "),
    ("chat", OPEN, "<s>[user] the cat</s>[assistant] "),
    (None, "the cat", "the cat"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base, and folders by format with the records that training leaves beside the weights."""
    root = tmp_path_factory.mktemp("trained")
    for seed, name in enumerate(("base", "text", "transcript", "chat")):
        build_model("llama", seed).save_pretrained(root / name)
        (root / name / "genarm.json").write_text(json.dumps({"prompt_format": name, "end_token_id": 40 + seed}))
    build_tokenizer().save_pretrained(root / "base")
    (root / "base" / "genarm.json").unlink()
    return root


@pytest.mark.parametrize(("prompt_format", "prompt", "expected"), FORMATS)
def test_an_arm_reads_the_format_it_was_trained_on(trained, tokenizer, prompt_format, prompt, expected):
    arm = build_model("llama", 3) if prompt_format is None else trained / prompt_format
    model = GenARM.from_pretrained(trained / "base", arm)
    assert tokenizer.decode(model.prepare([prompt])[0].token_ids[1]) == expected


def test_conflicts_of_formats_are_errors(trained):
    chat = [{"role": "system", "content": "x"}, *CHAT]
    for name, said in (("text", "trained on plain texts"), ("transcript", "trained on transcripts; a message of the")):
        with pytest.raises(ValueError, match=rf"prompts\[0\]: {name} was {said}"):
            GenARM.from_pretrained(trained / "base", trained / name).prepare([chat])
    with pytest.raises(ValueError, match=r"arms\[0\]: chat_template='x': expected none, it was trained on texts"):
        GenARM.from_pretrained(trained / "base", ARM(trained / "text", chat_template="x"))
    with pytest.raises(
        ValueError, match=r"arms\[0\]: prompt_template='{prompt}!': expected none, it was trained on chats"
    ):
        GenARM.from_pretrained(trained / "base", ARM(trained / "chat", prompt_template="{prompt}!"))


def test_what_ends_trained_answers_stops_the_text(trained):
    assert {1, 41} <= GenARM.from_pretrained(trained / "base", trained / "text").eos_token_ids
    assert 41 not in GenARM.from_pretrained(trained / "base").eos_token_ids


def test_the_token_that_a_template_puts_behind_an_answer():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "<end>")
    assert end_of_answer(tokenizer, tokenizer.chat_template) == 300
    assert end_of_answer(tokenizer, None) == end_of_answer(tokenizer, "{{ 1 / 0 }}") == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[7].content }}", "(UndefinedError|has no element|undefined)"),
        ("{{ oops", "unexpected end of template"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{{ 'x' * 20000000 }}", "20000000 characters: expected at most 16777216"),
    ],
)
def test_templates_that_fail(tokenizer, template, said):
    with pytest.raises(ValueError, match=said):
        render(tokenizer, CHAT, template)


PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FIRST = PARTS.replace("{% for part in m.content %}{{ part.text }}{% endfor %}", "{{ m.content[0].text }}")


@pytest.mark.parametrize("template", [PARTS, FIRST])
@pytest.mark.parametrize("parts", [False, True])
def test_a_template_that_reads_content_parts_alone(tokenizer, template, parts):
    """Templates of vision models do so, and would silently leave out a content that is a text."""
    given = [{"type": "text", "text": "the cat"}]
    chat = [as_message({"role": "user", "content": given if parts else "the cat"})]
    begun = [*chat, {"role": "assistant", "content": "sat"}]
    assert render(tokenizer, chat, template, add_generation_prompt=True) == "[user]the cat</s>[assistant]"
    assert render(tokenizer, begun, template, continue_final_message=True) == "[user]the cat</s>[assistant]sat"
    assert end_of_answer(tokenizer, template) == tokenizer.eos_token_id
    theirs = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in begun]
    assert render(tokenizer, begun, template) == tokenizer.apply_chat_template(
        theirs, chat_template=template, tokenize=False
    )


@pytest.mark.parametrize("change", ["m.content | upper", "m.content[:4]", "m.content.split('a')[-1]", "m.role"])
def test_a_template_that_changes_texts_still_gets_texts(tokenizer, change):
    """A template would print content parts as Python prints them, or fail."""
    template = "{% for m in messages %}[{{ " + change + " }}]{% endfor %}"
    assert render(tokenizer, CHAT, template) == tokenizer.apply_chat_template(
        CHAT, chat_template=template, tokenize=False
    )


def test_a_template_that_loses_the_answer_has_nothing_behind_it(tokenizer):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}"
    assert after_answer(tokenizer, template) == ""
    assert after_answer(tokenizer, PARTS) == "</s>"


def test_half_a_surrogate_pair_in_what_a_template_gets(model, monkeypatch):
    monkeypatch.setattr(model.base, "chat_template", "{{ style }}{{ messages[0].content }}")
    with pytest.raises(ValueError, match=r"prompts\[0\]: base's chat template can't render .*expected Unicode text"):
        model.prepare([{"messages": CHAT, "chat_template_kwargs": {"style": "\ud800"}}])


@pytest.mark.parametrize("name", ["image", "image_url", "file", "input_audio", "new_kind"])
def test_a_part_that_is_more_than_its_text(name):
    """Without a type the part would pass for text and the rest be lost. `datasets` fills keys that parts lack with
    nulls."""
    with pytest.raises(UnsupportedContent, match=f"a content part with '{name}': expected text parts"):
        as_message({"role": "user", "content": [{"text": "what?", name: "x"}]})
    assert as_message({"role": "user", "content": [{"text": "what?", name: None}]})["content"] == "what?"


def test_stop_strings_that_are_special_tokens(model):
    only_end = {"logit_bias": {1: 100.0}, "ignore_eos": True, "temperature": 0.0, "max_new_tokens": 5}
    output = model.generate("the", stop="</s>", **only_end)[0]
    assert (output.finish_reason, output.text, output.token_ids) == ("stop", "", [1])
    assert "".join(chunk.text for chunk in model.stream("the", stop=["x", "</s>"], **only_end)) == ""
    with pytest.raises(ValueError, match=r"prompts\[0\]: stop='a</s>': expected the special token '</s>' by itself"):
        model.generate("the", stop="a</s>")


def test_a_special_token_that_no_member_can_draw(trained):
    """The tokenizer has more tokens than there are logits, so the stop could not fire."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    model = GenARM.from_pretrained(trained / "base", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[0\]: stop='<end>': token id 300: expected less than 300"):
        model.generate("the", stop=["x", "<end>"], max_new_tokens=1)


def test_a_response_that_goes_on_with_a_word():
    """WordPiece writes the rest of a word differently from a separate word; only the joined text tells which it is."""
    vocabulary = {"[UNK]": 0, "the": 1, "cat": 2, "##cat": 3, ".": 4}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    prompt = Rendered("the", True)
    assert response_ids(tokenizer, prompt, [1], "cat") == [3]
    assert response_ids(tokenizer, prompt, [1], " cat") == [2]


def test_a_tokenizer_that_gives_up(model, monkeypatch):
    """Its regular expression might take forever, for example: then Rust panics with an error that is no Exception."""
    tokenizer = build_tokenizer()
    pattern = Regex("([a-z ]+)+!")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    monkeypatch.setattr(model.base, "tokenizer", tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[0\]: base: 72 characters: expected a text that the tokenizer can"):
        model.generate("the cat " * 9, max_new_tokens=1)
