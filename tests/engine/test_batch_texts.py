"""The device's copy of the texts is right after every change of a batch, and the host uploads only rows that joined."""

import random

import pytest
from doubles import Lagging, engines_on
from tiny_models import build_model

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine.batch import Batch
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.step import Steps
from genarm_fast.speculation.config import Speculation


@pytest.fixture
def model(tokenizer):
    return GenARM.from_pretrained(
        build_model("llama", 0), build_model("llama", 1), tokenizer=tokenizer, max_batch_size=3
    )


class Seen:
    """A record of each batch with texts: its rows, how many of them joined, and how many numbers were uploaded for
    it."""

    def __init__(self, monkeypatch):
        self.batches, self.sizes, uploads = [], [], []
        upload, batch, texts = Executor.upload, Steps.batch, Batch._texts

        def uploaded(executor, tensor):
            uploads.append(tensor.numel())
            return upload(executor, tensor)

        def texts_of(own, before, width):
            uploads.clear()
            found = texts(own, before, width)
            if width:
                known = before is not None and before.state.texts.shape[1] == width
                there = (
                    [each for row, each in enumerate(before.sequences) if before.epochs[row] == each.epoch]
                    if known
                    else []
                )
                joined = [each for each in own.sequences if not any(each is other for other in there)]
                longest = max((len(each.request.token_ids[0]) + len(each.tokens) for each in joined), default=0)
                self.sizes.append((len(own.sequences), len(joined), sum(uploads), len(joined) * longest))
            return found

        def checked(steps, sequences, **options):
            found = batch(steps, sequences, **options)
            if found.state.texts.shape[1]:
                self.check(found)
            return found

        monkeypatch.setattr(Executor, "upload", uploaded)
        monkeypatch.setattr(Batch, "_texts", texts_of)
        monkeypatch.setattr(Steps, "batch", checked)

    def check(self, batch):
        """The device has all tokens that the host knows; it may have more."""
        lengths = batch.state.text_lengths()
        for row, each in enumerate(batch.sequences):
            text = [*each.request.token_ids[0], *each.tokens]
            assert batch.state.texts[row, : len(text)].tolist() == text
            assert int(lengths[row]) >= len(text)
        assert int(batch.state.texts.min()) >= 0  # the device drafts for rows without a sequence too
        self.batches.append(len(batch.sequences))


@pytest.mark.parametrize("case", range(4))
def test_texts_stay_on_the_device(model, monkeypatch, case):
    """Seven requests of different lengths in three slots join and leave in every order."""
    rng = random.Random(case)
    prompts = [[rng.randint(2, 9) for _ in range(rng.randint(1, 12))] * 2 for _ in range(7)]
    params = [SamplingParams(max_new_tokens=rng.randint(1, 25), ignore_eos=True, seed=i) for i in range(7)]
    expected = [output.token_ids for output in model.generate(prompts, params, speculation="off")]
    seen = Seen(monkeypatch)
    with engines_on(Lagging(whole_steps=True)):
        outputs = model.generate(prompts, params, speculation=Speculation("ngram", 2))
    assert [output.token_ids for output in outputs] == expected
    assert len(seen.batches) > 5
    small = [(rows, joined, copied, most) for rows, joined, copied, most in seen.sizes]
    # The upload also has the indices of up to four rows.
    assert all(copied <= most + 2 * 4 for _, _, copied, most in small)
    assert any(joined < rows for rows, joined, _, _ in small)
    assert sum(joined for _, joined, _, _ in small) < sum(rows for rows, _, _, _ in small)


def test_weights_that_change_bring_a_text_anew(model, monkeypatch):
    seen = Seen(monkeypatch)
    with (
        engines_on(Lagging(whole_steps=True)),
        model.stream(
            [5, 6, 7, 5, 6], max_new_tokens=30, ignore_eos=True, seed=1, speculation=Speculation("ngram", 2)
        ) as stream,
    ):
        for i, _ in enumerate(stream):
            if i % 3 == 0:
                stream.set_weights(1.0 + i)
    assert len(seen.batches) > 5
    assert sum(joined for _, joined, _, _ in seen.sizes) > 2
