"""The prompt pool: held-out prompts share no subject with the training pool, HH openings come from training lines."""

import json
from pathlib import Path

import prompts


def test_held_out_prompts_are_not_in_the_training_pool():
    held_out, pool = prompts.held_out_prompts(), prompts.training_prompts()
    assert len(set(held_out)) == prompts.HELD_OUT
    assert len(set(pool)) == len(pool) > 2000
    assert not set(held_out) & set(pool)


def test_held_out_subjects_are_unknown_to_their_domain():
    pool = set(prompts.training_prompts())
    for prompt in prompts.held_out_prompts():
        domains = [
            [t.format(subject) for t in templates]
            for templates, subjects in prompts.DOMAINS.values()
            for subject in subjects
            if prompt in (t.format(subject) for t in templates)
        ]
        assert domains
        assert not pool & {variant for variants in domains for variant in variants}


def test_both_lists_are_fixed():
    assert prompts.training_prompts() == prompts.training_prompts()
    assert prompts.held_out_prompts() == prompts.held_out_prompts()


def test_hh_openings_skip_every_fifth_line_and_long_turns(tmp_path: Path):
    lines = [{"chosen": f"\n\nHuman: question {i}\n\nAssistant: a\n\nHuman: more\n\nAssistant: b"} for i in range(10)]
    lines[3] = {"chosen": "\n\nHuman: " + "x" * 400 + "\n\nAssistant: a"}
    file = tmp_path / "hh.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prompts.hh_openings(file) == [f"question {i}" for i in (1, 2, 4, 6, 7, 8, 9)]
    assert {"question 1", "question 9"} <= set(prompts.training_prompts(file))
