"""What a tuner learns from steps that are one launch, on a device that runs behind the host."""

from __future__ import annotations

import pytest
from doubles import Lagging, engines_on
from tiny_models import similar

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine.batch import Batch
from genarm_fast.engine.step import Steps
from genarm_fast.speculation.observations import PLAIN, Choice
from genarm_fast.speculation.policy import DraftPolicy

FREE = SamplingParams(max_new_tokens=24, ignore_eos=True, seed=1)


def test_auto_takes_its_times_from_whole_steps(tiny_model, tokenizer, monkeypatch):
    """Only the first steps are launched in pieces, to time a draft. The texts are uploaded once."""
    pieces, texts, launch, upload = [], [], Steps.launch, Batch._texts

    def counted(self, batch, policy, choice, one_launch=False):
        pieces.append(not one_launch)
        return launch(self, batch, policy, choice, one_launch)

    def uploaded(batch, before, width):
        texts.append(before is None or before.state.texts.shape[1] != width)
        return upload(batch, before, width)

    monkeypatch.setattr(Steps, "launch", counted)
    monkeypatch.setattr(Batch, "_texts", uploaded)
    model = GenARM.from_pretrained(tiny_model(), similar(), tokenizer=tokenizer)
    with engines_on(Lagging(whole_steps=True)):
        model.generate([[5, 6, 7], [8, 9]], FREE.override(max_new_tokens=60), speculation="auto")
    assert sum(pieces) == pieces.index(False) <= 3  # the host reads the second such step after it has launched a third
    assert len(pieces) > 20
    assert sum(texts) == 1
    (stats,) = model.tuners.stats()
    assert any(each["whole_seconds"] for each in stats["drafters"].values())


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_whole_steps_judge_whose_turn_it_is_not(tiny_model, tokenizer, monkeypatch, noise):
    """Members are judged by the token they would have drafted, in plain steps and in steps of another drafter, as in
    steps in pieces."""
    model = GenARM.from_pretrained(tiny_model(), [similar(noise=noise), similar(1, 0.5)], tokenizer=tokenizer)
    params = FREE.override(weights=[1.0, 0.1], max_new_tokens=40)

    def judged(choice, whole):
        """Return how often the first guess of each member was right, keyed by the drafter's index."""
        seen = {0: 0, 1: 0, 3: 0}  # the ARMs and the base; index 2 reads the text

        def observe(policy, i, guesses, drawn, *_):
            if i in seen:
                seen[i] += sum(guess[0] == tokens[0] for guess, tokens in zip(guesses, drawn) if tokens)

        monkeypatch.setattr(DraftPolicy, "choose", lambda *_: choice)
        monkeypatch.setattr(DraftPolicy, "timing_due", lambda _: not whole)
        monkeypatch.setattr(DraftPolicy, "shadow_due", lambda policy: policy.usable_drafters)
        monkeypatch.setattr(DraftPolicy, "observe_shadow", observe)
        with engines_on(Lagging(whole_steps=whole)):
            model.generate([[5, 6, 7], [8, 9]], params, speculation="auto")
        return seen

    plain, drafted = judged(PLAIN, True), judged(Choice(0, 2), True)
    assert plain == judged(PLAIN, False)
    assert drafted == judged(Choice(0, 2), False)
    assert (plain[0] > 60) == (noise == 0.0)  # out of 80
    assert plain[3] > drafted[3] > drafted[0] == 0  # the ARM that drafted, so no guess of it is judged
