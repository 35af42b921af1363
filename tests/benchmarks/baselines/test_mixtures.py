"""Products of models: each method follows its enumerated law, and the same draws reject a law close to it."""

from __future__ import annotations

import pytest


def product(enumerated, members, coefficients, temperature=1.0):
    def scores(tokens):
        each = [enumerated.logits(member, tokens).log_softmax(-1) for member in members]
        return sum(c * part for c, part in zip(coefficients, each)) / temperature

    return enumerated.law(scores)


def test_mixture(lm, enumerated) -> None:
    from baselines.mixture import mixture

    members = [lm(0), lm(1), lm(2)]

    def run(prompts, params):
        return mixture(members, [1.0, 0.7, -0.4], prompts, params)

    found = enumerated.drawn(run)
    assert enumerated.misfit(product(enumerated, members, [1.0, 0.7, -0.4]), found) < 5
    assert enumerated.misfit(product(enumerated, members, [1.0, 0.7, 0.0]), found) > 5


def test_sharpening_is_the_base_with_itself(lm, enumerated) -> None:
    from baselines.sharpening import sharpening

    def run(prompts, params):
        return sharpening(lm(0), 1.5, prompts, params)

    found = enumerated.drawn(run)
    assert enumerated.misfit(product(enumerated, [lm(0), lm(0)], [1.0, 1.5]), found) < 5
    assert enumerated.misfit(product(enumerated, [lm(0), lm(0)], [1.0, 0.5]), found) > 5
    with pytest.raises(ValueError, match=r"weight=-1\.0"):
        sharpening(lm(0), -1.0, [enumerated.prompt], None)


def test_mod(lm, enumerated) -> None:
    from baselines.interface import Params
    from baselines.mod import mod

    policies = [lm(1), lm(2)]

    def run(prompts, params):
        return mod(policies, [0.3, 0.7], prompts, params)

    found = enumerated.drawn(run)
    assert enumerated.misfit(product(enumerated, policies, [0.3, 0.7]), found) < 5
    assert enumerated.misfit(product(enumerated, policies, [0.7, 0.3]), found) > 5
    (alone,) = mod(policies, [0.0, 1.0], [enumerated.prompt], Params(max_new_tokens=2))
    assert alone.forwards == {"lm2": 2}
    for wrong in ([0.5, 0.6], [1.5, -0.5], [1.0]):
        with pytest.raises(ValueError, match="weights="):
            mod(policies, wrong, [enumerated.prompt], Params())


def test_difference(lm, enumerated) -> None:
    from baselines.difference import emulated_fine_tuning, proxy_tuning

    members = [lm(0), lm(1), lm(2)]

    def proxied(prompts, params):
        return proxy_tuning(*members, 0.8, prompts, params)

    def emulated(prompts, params):
        return emulated_fine_tuning(*members, 1.25, prompts, params)

    found_emulated = enumerated.drawn(emulated)
    found_proxied = enumerated.drawn(proxied)
    right = product(enumerated, members, [1.0, 0.8, -0.8])
    assert enumerated.misfit(right, found_proxied) < 5
    assert enumerated.misfit(right, found_emulated) < 5
    assert enumerated.misfit(product(enumerated, members, [1.0, -0.8, 0.8]), found_proxied) > 5


def test_engine_and_plain_twin_agree(lm, tokenizer, enumerated) -> None:
    """Both sample from GenARM's law."""
    from baselines.guided import guided
    from baselines.mixture import mixture

    from genarm_fast import GenARM

    members = [lm(0), lm(1)]
    model = GenARM.from_pretrained(members[0].model, members[1].model, tokenizer=tokenizer, max_batch_size=64)
    right = product(enumerated, members, [1.0, 1.2])

    def plain(prompts, params):
        return mixture(members, [1.0, 1.2], prompts, params)

    def engine(prompts, params):
        return guided(model, [1.2], prompts, params)

    found = enumerated.drawn(engine)
    assert enumerated.misfit(right, enumerated.drawn(plain)) < 5
    assert enumerated.misfit(right, found) < 5
    assert enumerated.misfit(product(enumerated, members, [1.0, 0.4]), found) > 5


def test_forwards_of_a_batch_with_different_prompts(lm) -> None:
    """Left padding changes nothing, a stop token ends a row, and a row counts forwards until it ends."""
    from baselines.interface import Params
    from baselines.mixture import mixture

    prompts = [[1, 2, 3, 4], [2], [3, 0]]
    params = Params(max_new_tokens=6, seed=3, stop_token_ids=(5,))
    together = mixture([lm(0), lm(1)], [1.0, 1.0], prompts, params)
    for i, prompt in enumerate(prompts):
        alone = Params(max_new_tokens=6, seed=3 + i, stop_token_ids=(5,))
        assert mixture([lm(0), lm(1)], [1.0, 1.0], [prompt], alone)[0].tokens == together[i].tokens
    assert len({len(response.tokens) for response in together}) > 1, "the case should have ended rows"
    for response in together:
        assert response.forwards == {"lm0": len(response.tokens), "lm1": len(response.tokens)}


def test_bad_arguments(lm) -> None:
    from baselines.interface import Params
    from baselines.mixture import mixture

    with pytest.raises(ValueError, match="max_new_tokens=0"):
        Params(max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        Params(temperature=-1)
    with pytest.raises(ValueError, match="coefficients="):
        mixture([lm(0)], [1.0, 1.0], [[1]], Params())
    with pytest.raises(ValueError, match="different names"):
        mixture([lm(0), lm(0)], [1.0, 1.0], [[1]], Params())
