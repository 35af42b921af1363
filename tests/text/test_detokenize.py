"""Text decoded in pieces equals the text decoded at once."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from genarm_fast import GenARM
from genarm_fast.text.detokenize import Detokenizer, StopStrings, decode, decoder, token_bytes

TEXTS = [
    "the cat sat on the mat",
    "naïve café",
    "日本語テキスト",
    "👩‍👩‍👧 family 🏳️‍🌈",
    "a\n\n  b\t c ",
    "�",
    "x � y",
    "مرحبا",
]


@pytest.fixture(scope="module")
def spaced_tokenizer():
    """A tokenizer like SentencePiece: decoding drops the first token's leading space; unknown characters become
    bytes."""
    pieces = ["<s>", "</s>", "▁", *(f"<0x{i:02X}>" for i in range(256)), "▁a", "▁the", "the", "c", "a", "t", "▁cat"]
    backend = Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], byte_fallback=True, unk_id=0)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def pieces_of(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_shown_half(tokenizer, spaced_tokenizer, text):
    for each in (tokenizer, spaced_tokenizer):
        ids = each(text, add_special_tokens=False)["input_ids"]
        pieces = pieces_of(each, ids)
        assert "".join(pieces) == decode(each, ids)
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces_of(tokenizer, tokenizer(text)["input_ids"])) == text


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_are_those_of_their_text(tokenizer, spaced_tokenizer, text):
    """A character of several tokens is in none of their texts."""
    for each in (tokenizer, spaced_tokenizer):
        ids = each.encode(text, add_special_tokens=False)
        found = b"".join(token_bytes(each, token) for token in ids)
        assert found.decode().lstrip(" ") == text.lstrip(" ")


def test_bytes_that_no_name_tells(word_tokenizer):
    word_tokenizer.add_tokens(["\ufffd語"])
    assert token_bytes(word_tokenizer, word_tokenizer.convert_tokens_to_ids("\ufffd語")) is None


def test_any_tokens(tokenizer):
    """The tokens are random bytes, mostly no UTF-8, with special tokens between them."""
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(300) for _ in range(rng.randint(1, 20))]
        assert "".join(pieces_of(tokenizer, ids)) == decode(tokenizer, ids)


@pytest.fixture(scope="module")
def word_tokenizer():
    """A tokenizer like BERT's, which writes a word's continuation with ## before it."""
    vocabulary = {"[UNK]": 0, "the": 1, "cat": 2, "##cat": 3, "##s": 4, "[EOS]": 5}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]")


def test_a_text_goes_on_where_the_prompt_ends(tokenizer, spaced_tokenizer, word_tokenizer):
    """Prompt and text joined equal the tokenizer's decoding of all tokens."""
    rng = random.Random(0)
    words = {spaced_tokenizer: range(259, 265), word_tokenizer: range(1, 6), tokenizer: range(256, 300)}
    for each, ids in words.items():
        for _ in range(100):
            prompt, new = ([rng.choice(ids) for _ in range(rng.randint(1, 12))] for _ in range(2))
            detokenizer = Detokenizer(each, prompt)
            text = "".join([*(detokenizer.push(token) for token in new), detokenizer.flush()])
            assert decode(each, prompt) + text == decode(each, prompt + new)


def test_a_prompt_that_ends_within_a_character(tokenizer):
    """A prompt that ends within a character, or shows nothing, does not change the text of the new tokens."""
    whole = tokenizer("é x")["input_ids"]
    for before in (tokenizer("a é")["input_ids"][:-1], [0, 1], []):
        detokenizer = Detokenizer(tokenizer, before)
        assert "".join([*(detokenizer.push(token) for token in whole), detokenizer.flush()]) == "é x"
    *before, last = tokenizer("a é")["input_ids"]
    rest = [last, *tokenizer(" x")["input_ids"]]
    detokenizer = Detokenizer(tokenizer, before)
    assert "".join([*(detokenizer.push(token) for token in rest), detokenizer.flush()]) == "\ufffd x"


def test_generated_text_keeps_its_leading_space(spaced_tokenizer, tiny_model):
    model = GenARM.from_pretrained(tiny_model(vocab_size=len(spaced_tokenizer)), tokenizer=spaced_tokenizer)
    cat = spaced_tokenizer.convert_tokens_to_ids("▁cat")
    options = {"logit_bias": {cat: 1000.0}, "max_new_tokens": 2, "temperature": 0.0}
    assert model.generate("the", **options)[0].text == " cat cat"
    assert model.generate(spaced_tokenizer("the")["input_ids"], stop="cat", **options)[0].text == " "
    with model.stream("the", **options) as stream:
        assert [chunk.text for chunk in stream] == [" cat", " cat"]


def test_long_runs_of_bytes_that_are_no_text(tokenizer):
    """The end of a run may still become a character."""
    rng = random.Random(0)
    spelled = [tokenizer(text)["input_ids"] for text in ("é", "日", "👩", "\ufffd", "a")]
    for _ in range(300):
        ids = []
        for _ in range(rng.randint(1, 40)):
            one = rng.choice(spelled)
            ids += one[: rng.randint(1, len(one))] * rng.choice([1, 1, 5])
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == decode(tokenizer, ids)


class Shouting(PreTrainedTokenizerFast):
    def _decode(self, token_ids, **kwargs):
        return super()._decode(token_ids, **kwargs).upper()


def test_a_tokenizer_with_a_decode_of_its_own(tokenizer):
    ids = tokenizer("the cat</s>")["input_ids"]
    own = Shouting(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    for each, text in ((tokenizer, "the cat"), (own, "THE CAT")):
        assert decoder(each, skip_special_tokens=True)(ids) == decode(each, ids) == text
        assert "".join(pieces_of(each, ids)) == text
    assert decoder(tokenizer, skip_special_tokens=False)(ids) == "the cat</s>"


@pytest.mark.parametrize(("text", "most"), [("the cat é ", 4), ("\ufffd", 14), ("</s>", 1)])
def test_work_does_not_grow_with_the_length(tokenizer, monkeypatch, text, most):
    sizes = []
    original = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **kwargs: (sizes.append(len(ids)), original(ids, **kwargs))[1])
    pieces = pieces_of(tokenizer, tokenizer(text * 200)["input_ids"])
    assert max(sizes) <= most
    assert len(pieces[-1]) <= 8  # the rest was shown before


def shown(stops, pieces):
    matcher = StopStrings(stops)
    texts = []
    for piece in pieces:
        texts.append(matcher.push(piece))
        if matcher.found:
            break
    else:
        texts.append(matcher.flush())
    return texts, matcher.found


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_stop_strings_do_not_depend_on_borders(size):
    text = "abc END of abcd story.\n\nUser: no"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for stops, expected in [
        (("\n\nUser:",), ("abc END of abcd story.", "\n\nUser:")),
        (("story.\n\nX", "abcd"), ("abc END of ", "abcd")),
        (("bc", "abc"), ("", "abc")),  # both end at the same character: the longer one counts
        (("bcd", "abcdef"), ("abc END of a", "bcd")),
        (("zzz",), (text, None)),
        ((), (text, None)),
    ]:
        texts, found = shown(stops, pieces)
        assert ("".join(texts), found) == expected


def test_only_what_may_become_a_stop_string_is_held_back():
    matcher = StopStrings(("</end>", "aab"))
    assert [matcher.push(piece) for piece in ["x<", "/en", "q a", "a", "c a", "aa"]] == [
        "x",
        "",
        "</enq ",
        "",
        "aac ",
        "a",
    ]
    assert matcher.flush() == "aa"
    assert matcher.found is None
