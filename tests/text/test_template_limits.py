"""Chat templates are foreign programs: whatever one does, it ends soon, in any thread, and the error names it."""

from __future__ import annotations

import os
import threading
import time

import pytest
from tiny_models import CHAT_TEMPLATE, build_tokenizer

from genarm_fast.text import deadline, helper, templates
from genarm_fast.text.template_kinds import is_plain
from genarm_fast.text.templates import render
from genarm_fast.train import TrainConfig
from genarm_fast.train.data import Pair
from genarm_fast.train.encode import Encoder

CHAT = [{"role": "user", "content": "hello"}]
FOR = "{% for a in range(90000) %}"
LOOP = FOR * 3 + "{% endfor %}" * 3
DOUBLING = "{% set ns = namespace(x='xxxxxxxx') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
HOSTILE = {
    "loops": (LOOP, "it takes more than 1 s"),
    "power": ("{{ 9 ** (9 ** 9) }}", "it takes more than"),
    "power of a message": ("{{ (messages[0].content | length) ** (9 ** 9) }}", "it takes more than"),
    "spaces": ("{{ ' ' * 10 ** 13 }}", "MemoryError|it takes more than|characters"),
    "format": ("{{ '%99999999999d' % 1 }}", "MemoryError|it takes more than|characters"),
    "centre": ("{{ 'a' | center(99999999999) }}", "MemoryError|it takes more than|characters"),
    "doubling": (DOUBLING, "it takes more than"),
    "output": (
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
        "characters: expected|it takes more than",
    ),
    "long message": (
        "{% for a in range(99999) %}{{ messages[0].content }}{% endfor %}",
        "characters: expected|it takes more than",
    ),
    "join": (
        "{{ range(99999) | map('default', messages[0].content, true) | join(messages[0].content) }}",
        "characters|it takes more than",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "nesting": ("(" * 5000, None),
    "nested expression": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError|MemoryError|too many"),
    "nested blocks": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "RecursionError|MemoryError|too many|Indentation"),
    "escape": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "refusal": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "refusal apart": ("{{ 2 * 3 }}{{ raise_exception('roles must alternate') }}", "^roles must alternate"),
}


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(deadline, "LIMIT_SECONDS", 1.0)
    monkeypatch.setattr(deadline, "MAX_GROWTH_BYTES", 1 << 28)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["main", "thread"])
def test_hostile_templates_end(tokenizer, hasty, name, elsewhere):
    template, said = HOSTILE[name]
    chat = [{"role": "user", "content": "x" * 1000}]
    found = []

    def attempt():
        try:
            found.append(render(tokenizer, chat, template))
        except ValueError as error:
            found.append(error)

    if elsewhere:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    else:
        attempt()
    (result,) = found
    if said is None:
        assert result == template
    else:
        with pytest.raises(ValueError, match=said):
            raise result
    assert render(tokenizer, CHAT, CHAT_TEMPLATE) == "<s>[user] hello</s>"  # the hostile template left nothing behind


def test_the_row_and_the_template_are_named(tokenizer, hasty, tiny_model, tmp_path):
    from genarm_fast import ARM, GenARM

    model = GenARM.from_pretrained(tiny_model(), ARM(tiny_model(seed=1), chat_template=LOOP), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[1\]: arm's chat template can't render it: it takes more than 1 s"):
        model.generate([[2, 3], CHAT])
    encoder = Encoder(tokenizer, TrainConfig(base="b", data="d", output=str(tmp_path / "o"), chat_template=LOOP))
    with pytest.raises(ValueError, match=r"d\.jsonl line 7: the chat template can't render the prompt: it takes more"):
        encoder([Pair(3, CHAT, "yes", "no", line=7)], "d.jsonl")


REAL = [
    CHAT_TEMPLATE,
    "{% generation %}{{ messages[0]['content'] | trim }}{% endgeneration %}",
    "{% for m in messages %}{% if (loop.index0 % 2) == 1 %}{{ '\\n' }}{% endif %}{{ m.role + m.content }}{% endfor %}",
    "{%- set ns = namespace(a='') %}{% for t in tools or [] %}{{ t | tojson(indent=4) }}{% endfor %}{{ ns.a }}",
]


@pytest.mark.parametrize("template", REAL)
def test_ordinary_templates_run_here_and_apart_alike(tokenizer, monkeypatch, template):
    assert is_plain(template)
    monkeypatch.setattr(helper.shared_helper, "render", lambda *_: pytest.fail("another process renders it"))
    chat = [*CHAT, {"role": "assistant", "content": "why"}]
    here = [render(tokenizer, chat, template, **{ahead: True}) for ahead in ("x", "add_generation_prompt")]
    monkeypatch.undo()
    monkeypatch.setattr(templates, "is_plain", lambda template: False)
    apart = [render(tokenizer, chat, template, **{ahead: True}) for ahead in ("x", "add_generation_prompt")]
    assert (
        here
        == apart
        == [
            tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **{ahead: True})
            for ahead in ("x", "add_generation_prompt")
        ]
    )


def test_a_helper_that_dies_is_replaced():
    tokenizer = build_tokenizer()
    assert render(tokenizer, CHAT, "{{ 2 * 3 }}") == "6"
    helper.shared_helper.process.kill()
    helper.shared_helper.process.wait()
    assert render(tokenizer, CHAT, "{{ 2 * 4 }}") == "8"
    child = os.fork()
    if child == 0:
        os._exit(render(tokenizer, CHAT, "{{ 2 * 5 }}") != "10" or render(tokenizer, CHAT, CHAT_TEMPLATE) == "")
    assert os.waitpid(child, 0)[1] == 0
    assert render(tokenizer, CHAT, "{{ 2 * 6 }}") == "12"


def test_a_deadline_that_was_met_leaves_nothing_behind():
    for seconds in (0.0, 0.04, 0.05, 0.06):
        with_or_without = []
        for _ in range(20):
            try:
                deadline.run_within_limits(lambda: time.sleep(0.05), seconds)
                with_or_without.append(True)
            except TimeoutError:
                with_or_without.append(False)
            sum(range(1000))  # a late exception would come here
        assert not deadline._watch.calls
