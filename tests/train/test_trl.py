"""TRL's preference formats: training here uses the tokens that TRL's DPOTrainer makes of a row.

Intended differences have a test each; docs/training.md#trls-formats lists them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from genarm_fast.kernels.arm_logps import IGNORE
from genarm_fast.train import TrainConfig
from genarm_fast.train.batches import rows as plain_rows
from genarm_fast.train.data import SEVERAL, load_pairs
from genarm_fast.train.encode import Encoded, Encoder
from genarm_fast.train.metrics import PairStats, pair_losses

Theirs = Callable[..., tuple[list[dict[str, list[int]]], dict[str, torch.Tensor]]]

TEMPLATE = (
    "{% if style %}<style>{{ style }}</s>{% endif %}"
    "{% if tools %}<tools>{{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<t>{{ m.reasoning_content }}</t>{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content or [] %}{{ part.text }}{% endfor %}"
    "{% endif %}{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is false %}<t></t>{% endif %}{% endif %}"
)
USER, SYSTEM = {"role": "user", "content": "is the sea blue?"}, {"role": "system", "content": "be brief"}
YES, NO = {"role": "assistant", "content": "it is"}, {"role": "assistant", "content": "no, the sun"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SEEN = {"role": "tool", "name": "look", "content": "blue"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "looks",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}


def parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


SAME = {
    "text": [{"prompt": "the sea is", "chosen": " blue", "rejected": " a cat"}],
    "text, implicit prompt": [
        {"chosen": "the sea is blue", "rejected": "the sea is a cat"},
        {"chosen": "xzq", "rejected": "xzqvj"},  # one response begins the other
        {"chosen": "xzqj", "rejected": "xzqv"},  # the responses differ within a word
    ],
    "text with an end of its own": [{"prompt": "the sea is", "chosen": " blue</s>", "rejected": " a cat"}],
    "chat": [{"prompt": [SYSTEM, USER], "chosen": [YES], "rejected": [NO]}],
    "chat, implicit prompt": [{"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]}],
    "tools": [{"prompt": [USER], "chosen": [CALLS], "rejected": [NO], "tools": [TOOL]}],
    "tools as JSON": [{"prompt": [USER], "chosen": [YES], "rejected": [NO], "tools": json.dumps([TOOL])}],
    "tool calls in the prompt": [{"prompt": [USER, CALLS, SEEN], "chosen": [YES], "rejected": [NO]}],
    "template arguments": [
        {
            "prompt": [USER],
            "chosen": [YES],
            "rejected": [NO],
            "chat_template_kwargs": {"enable_thinking": True, "style": "terse"},
        }
    ],
    "tools and template arguments": [
        {
            "prompt": [USER],
            "chosen": [CALLS],
            "rejected": [NO],
            "tools": [TOOL],
            "chat_template_kwargs": {"enable_thinking": True, "style": "terse"},
        }
    ],
    "reasoning": [{"prompt": [USER], "chosen": [YES | {"reasoning_content": "hm"}], "rejected": [NO]}],
    "margin": [{"prompt": "the sea is", "chosen": " blue", "rejected": " a cat", "margin": 0.5}],
    "parts": [{"prompt": [parts(SYSTEM), parts(USER)], "chosen": [parts(YES)], "rejected": [parts(NO)]}],
    "several messages": [{"prompt": [USER], "chosen": [CALLS, SEEN, YES], "rejected": [NO]}],
    "several messages, implicit prompt": [{"chosen": [USER, YES, SYSTEM, NO], "rejected": [USER, NO, USER, YES]}],
}


@pytest.fixture(scope="module")
def chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer whose template has tools, reasoning and parts, whose answers end with </s>, with the pad token TRL
    needs."""
    own = copy.deepcopy(tokenizer)
    own.chat_template, own.pad_token = TEMPLATE, "</s>"
    return own


@pytest.fixture(scope="module")
def theirs(tiny_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """theirs(rows, tokenizer): what DPOTrainer makes of each row, and its batch of all rows."""

    def tokenized(given: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> Any:
        folder = str(tmp_path_factory.mktemp("trl"))
        arguments = DPOConfig(folder, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
        model = copy.deepcopy(tiny_model(hidden_size=16))
        trainer = DPOTrainer(
            model, copy.deepcopy(model), arguments, train_dataset=Dataset.from_list(given), processing_class=tokenizer
        )
        found = [
            {name: row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")} for row in trainer.train_dataset
        ]
        return found, trainer.data_collator(list(trainer.train_dataset))

    return tokenized


def ours(given: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[Encoded]:
    """Encode the rows by this package, passed through `datasets` as TRL gets them."""
    config = TrainConfig(base="b", output="o", **options)
    pairs = load_pairs(Dataset.from_list(given)).pairs
    kept, dropped = Encoder(tokenizer, config, frozenset({1}))(pairs, "d")
    assert not dropped
    return kept


def ids(pair: Encoded) -> dict[str, list[int]]:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


@pytest.mark.parametrize("form", SAME)
def test_tokens_and_labels_are_those_of_trl(theirs: Theirs, chat: PreTrainedTokenizerFast, form: str) -> None:
    found, (expected, batch) = ours(SAME[form], chat), theirs(SAME[form], chat)
    assert [ids(pair) for pair in found] == expected
    # The loss sums the tokens that TRL's completion mask marks, and the tokens that are targets here.
    labels = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["completion_mask"])]
    assert [row[row != IGNORE].tolist() for row in plain_rows(found, 0)["targets"]] == labels


def test_a_tokenizer_that_begins_texts(theirs: Theirs, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    own = copy.deepcopy(bos_tokenizer)
    own.pad_token, own.chat_template = "</s>", "{{ bos_token }}" + TEMPLATE
    for form in ("text", "text, implicit prompt", "chat"):
        assert [ids(pair) for pair in ours(SAME[form], own)] == theirs(SAME[form], own)[0]


def test_another_row_has_other_tokens(theirs: Theirs, chat: PreTrainedTokenizerFast) -> None:
    """The comparison notices one token, one label, a template's argument and a lost tool."""
    (row,) = SAME["tools and template arguments"]
    (expected,), _ = theirs([row], chat)
    for other in (
        row | {"chosen": [CALLS | {"content": "."}]},
        row | {"chat_template_kwargs": {"style": "long"}},
        row | {"tools": None},
        row | {"prompt": [SYSTEM, USER]},
    ):
        assert ids(ours([other], chat)[0]) != expected


def test_margins_are_those_of_trls_reward_trainer(
    tiny_model: Callable[..., PreTrainedModel], chat: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """DPOTrainer ignores margins. RewardTrainer subtracts them from the difference of rewards, as the loss here
    does."""
    given = [*SAME["margin"], {"prompt": "the cat", "chosen": " sat", "rejected": " is the sea", "margin": -1.5}]
    batch_of_theirs = RewardTrainer.__init__.__globals__["DataCollatorForPreference"](pad_token_id=1)(
        [{"chosen_ids": [2], "rejected_ids": [3], "margin": row["margin"]} for row in given]
    )
    found = ours(given, chat)
    assert [pair.margin for pair in found] == batch_of_theirs["margin"].tolist() == [0.5, -1.5]
    rewards = torch.tensor([-3.0, -8.0, -4.0, -2.0])
    stub = object.__new__(RewardTrainer)
    stub.args = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", center_rewards_coefficient=None)
    chosen, rejected = (0.25 * rewards).chunk(2)
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - batch_of_theirs["margin"])
    torch.testing.assert_close(pair_losses(rewards, 0.25, torch.tensor([p.margin for p in found])), expected)
    stats = PairStats(0.25)
    stats.add(rewards, torch.ones(4), torch.tensor([p.margin for p in found]))
    assert stats.summary()["loss"] == pytest.approx(float(expected.mean()))


class TestOnPurpose:
    """Cases in which the tokens differ from TRL's on purpose."""

    def test_what_a_template_puts_behind_the_end_of_an_answer(
        self, theirs: Theirs, chat: PreTrainedTokenizerFast
    ) -> None:
        """An example is ChatML's line break. Decoding stops before it, so it is no part of an answer; TRL trains on
        it."""
        own = copy.deepcopy(chat)
        own.chat_template = TEMPLATE.replace("{% endfor %}</s>", "{% endfor %}</s>\n")
        (pair,), ((expected,), _) = ours(SAME["chat"], own), theirs(SAME["chat"], own)
        line_break = own("\n")["input_ids"]
        assert pair.prompt == expected["prompt"]
        assert pair.chosen + line_break == expected["chosen"]
        assert pair.rejected + line_break == expected["rejected"]

    def test_a_template_without_an_end(self, theirs: Theirs, chat: PreTrainedTokenizerFast) -> None:
        """TRL's answers then have no end, and a model trained on them would never end one."""
        own = copy.deepcopy(chat)
        own.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + (
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        (pair,), ((expected,), _) = ours(SAME["chat"], own), theirs(SAME["chat"], own)
        assert pair.chosen == [*expected["chosen"], own.eos_token_id]

    def test_a_border_that_the_tokenizer_joins(self, theirs: Theirs, chat: PreTrainedTokenizerFast) -> None:
        """TRL starts the response within the joined token. Decoding cannot, so the prompt keeps its own tokens."""
        row = {"prompt": "the sea an", "chosen": "d", "rejected": "x"}
        (pair,), ((expected,), _) = ours([row], chat), theirs([row], chat)
        assert pair.prompt == chat(row["prompt"])["input_ids"] != expected["prompt"]
        assert len(expected["prompt"]) < len(pair.prompt)
        assert chat.decode(pair.prompt + pair.chosen) == "the sea and</s>"

    def test_a_prompt_that_a_template_renders_otherwise_with_its_answer(
        self, theirs: Theirs, chat: PreTrainedTokenizerFast
    ) -> None:
        """Only the prompt has an empty thought. Decoding reads it, so training does too. TRL leaves it out."""
        row = SAME["chat"][0] | {"chat_template_kwargs": {"enable_thinking": False}}
        (pair,), ((expected,), _) = ours([row], chat), theirs([row], chat)
        assert chat.decode(pair.prompt).endswith("[assistant]<t></t>")
        assert chat.decode(expected["prompt"]).endswith("[assistant]")
        assert pair.chosen == expected["chosen"]

    def test_messages_that_both_responses_begin_with(self, theirs: Theirs, chat: PreTrainedTokenizerFast) -> None:
        """Here they belong to the prompt. In TRL they belong to both responses, and their rewards cancel in the
        loss."""
        row = {"prompt": [USER], "chosen": [YES, USER, YES], "rejected": [YES, USER, NO]}
        (pair,), ((expected,), _) = ours([row], chat), theirs([row], chat)
        common = len(pair.prompt) - len(expected["prompt"])
        assert common > 0
        assert expected["chosen"][:common] == expected["rejected"][:common]
        assert expected["prompt"] + expected["chosen"][:common] == pair.prompt
        assert expected["chosen"][common:] == pair.chosen
        assert expected["rejected"][common:] == pair.rejected

    def test_transcripts(self, theirs: Theirs, chat: PreTrainedTokenizerFast) -> None:
        """In the HH data the response is the whole last turn. TRL's begins where the two texts differ."""
        before = "\n\nHuman: hi\n\nAssistant:"
        row = {"chosen": before + " the sea", "rejected": before + " the cat"}
        (pair,), ((expected,), _) = ours([row], chat), theirs([row], chat)
        assert chat.decode(pair.prompt) == before
        assert chat.decode(expected["prompt"]) == before + " the"
        assert pair.prompt + pair.chosen == expected["prompt"] + expected["chosen"]

    def test_long_pairs_are_dropped(self, chat: PreTrainedTokenizerFast) -> None:
        pairs = load_pairs(SAME["text"]).pairs
        config = TrainConfig(base="b", output="o", max_response_tokens=3)
        assert Encoder(chat, config)(pairs, "d") == ([], {"response too long": 1})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completion": "c", "label": True}, "field 'chosen' is missing, found"),  # unpaired
        ({"messages": [USER, YES]}, "field 'chosen' is missing, found"),
        ({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}, "field 'chosen' is missing, found"),
        ({"chosen": "yes", "rejected": "no"}, "field 'prompt' is missing, and 'chosen' and 'rejected' begin with"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "images": ["x.png"]}, "field 'images': expected texts alone"),
        ({"prompt": [USER], "chosen": [YES, USER], "rejected": [NO]}, "field 'chosen': expected messages that begin"),
        ({"prompt": [USER], "chosen": [SEEN, YES], "rejected": [NO]}, "got tool, assistant"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "1"}, "field 'margin': expected a finite number"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")}, "field 'margin': expected a finite"),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO], "tools": "[{"}, "field 'tools': expected a list, or"),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO], "tools": "3"}, "field 'tools': expected a list, got"),
        (
            {"chosen": [{"from": "human", "value": "hi"}], "rejected": [{"from": "human", "value": "ho"}]},
            "expected the keys 'role' and 'content'",
        ),
    ],
)
def test_what_is_not_taken_is_refused_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"data line 1: .*{message}"):
        load_pairs([row])


def test_image_parts_are_dropped_and_counted() -> None:
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    rows = [{"prompt": [picture], "chosen": [YES], "rejected": [NO]}, SAME["chat"][0], *SAME["several messages"]]
    assert load_pairs(rows).dropped == {"a content part of type 'image': expected text parts": 1, SEVERAL: 1}


def test_a_template_that_rewrites_the_first_of_several_messages(chat: PreTrainedTokenizerFast) -> None:
    """The pair is dropped and counted, because the rendered answer does not continue the prompt."""
    own = copy.deepcopy(chat)
    own.chat_template = "{{ messages | length }}" + TEMPLATE
    pairs = load_pairs(SAME["several messages"]).pairs
    kept, dropped = Encoder(own, TrainConfig(base="b", output="o"))(pairs, "d")
    assert (kept, dropped) == ([], {"the chat template does not continue the prompt with the answer": 1})
