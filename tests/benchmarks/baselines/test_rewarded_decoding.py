"""Best-of-N, ARGS and Transfer-Q, compared with enumerated laws of a tiny model and a tiny reward."""

from __future__ import annotations

import itertools

import pytest
import torch


def reward_of(reward, enumerated, tokens) -> float:
    """Return the reward of the text without its stop token, from one forward without a cache."""
    kept = list(itertools.takewhile(lambda token: token != enumerated.stop, tokens))
    return plain_reward(reward, [*enumerated.prompt, *kept])


@torch.inference_mode()
def plain_reward(reward, tokens) -> float:
    hidden = reward.decoder(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state
    return reward.head(hidden[0, -1]).item()


def test_rewards_of_rows_are_those_of_each_alone(judge) -> None:
    """Rows share a beginning or none, in batches of any size; the shortest row begins the others."""
    reward = judge(4)
    for rows in ([[1, 2, 3], [1, 2], [1, 2, 4, 4]], [[1, 2], [3], [4, 3, 1]], [[2, 2]], [[1, 3], [1, 3]]):
        wanted = torch.tensor([plain_reward(reward, row) for row in rows])
        for batch in (1, 2, 16):
            torch.testing.assert_close(reward(rows, batch=batch), wanted, rtol=1e-4, atol=1e-5)


def test_best_of_n(lm, judge, enumerated) -> None:
    from baselines.best_of_n import best_of_n

    reward, base = judge(4), enumerated.law(lambda tokens: enumerated.logits(lm(0), tokens))
    ranked = sorted(base, key=lambda text: reward_of(reward, enumerated, text))

    def best(n):
        """Return P(the best of n is y) = F(y)^n − F(y−)^n, where F is the cumulative law by reward."""
        law, below = {}, 0.0
        for text in ranked:
            law[text] = (below + base[text]) ** n - below**n
            below += base[text]
        return law

    def run(prompts, params):
        return best_of_n(lm(0), reward, 3, prompts, params)

    found = enumerated.drawn(run)
    assert enumerated.misfit(best(3), found) < 5
    assert enumerated.misfit(best(1), found) > 5
    assert enumerated.misfit(best(4), found) > 5


def test_forwards_of_best_of_n(lm, judge) -> None:
    from baselines.best_of_n import best_of_n
    from baselines.interface import Params

    (response,) = best_of_n(lm(0), judge(4), 5, [[1, 2]], Params(max_new_tokens=3))
    assert response.forwards == {"lm0": 15, "reward": 5}
    with pytest.raises(ValueError, match="n=0"):
        best_of_n(lm(0), judge(4), 0, [[1]], Params())


def args_law(enumerated, base, reward, weight, k):
    def scores(tokens):
        z = enumerated.logits(base, tokens)
        found = torch.full_like(z, -torch.inf)
        for candidate in z.topk(k).indices.tolist():
            found[candidate] = z[candidate] + weight * reward_of(reward, enumerated, [*tokens, candidate])
        return found

    return enumerated.law(scores)


def test_args_sampling(lm, judge, enumerated) -> None:
    from baselines.args import args
    from baselines.interface import reward_member

    reward = judge(4)
    member = reward_member("reward", reward)

    def run(prompts, params):
        return args(lm(0), member, prompts, params, weight=1.5, k=4)

    found = enumerated.drawn(run)
    assert enumerated.misfit(args_law(enumerated, lm(0), reward, 1.5, 4), found) < 5
    assert enumerated.misfit(args_law(enumerated, lm(0), reward, 0.0, 4), found) > 5
    assert enumerated.misfit(args_law(enumerated, lm(0), reward, 1.5, 2), found) > 5


def test_args_greedy(lm, judge, enumerated) -> None:
    """Each step is worked out by hand, over rows of different prompts and lengths."""
    from baselines.args import args
    from baselines.interface import Params, reward_member

    reward, prompts = judge(4), [[1, 3, 2], [2, 2], [4]]
    params = Params(max_new_tokens=5, temperature=0.0, stop_token_ids=(enumerated.stop,))
    responses = args(lm(0), reward_member("reward", reward), prompts, params, weight=3.0, k=3)
    plain = args(lm(0), reward_member("reward", reward), prompts, params, weight=0.0, k=3)
    for prompt, response in zip(prompts, responses):
        tokens: list[int] = []
        while len(tokens) < 5 and enumerated.stop not in tokens:
            with torch.inference_mode():
                z = lm(0).model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1]
            values = {}
            for c in z.topk(3).indices.tolist():
                text = [*prompt, *tokens] + [c] * (c != enumerated.stop)
                values[c] = z[c].item() + 3.0 * plain_reward(reward, text)
            tokens.append(max(values, key=values.__getitem__))
        assert response.tokens == tokens
        assert response.forwards == {"lm0": len(tokens), "reward": 1 + 3 * len(tokens) + len(tokens) - 1}
    assert [r.tokens for r in plain] != [r.tokens for r in responses], "the reward should matter here"


@pytest.mark.parametrize("indirect", [False, True])
def test_transfer_q(lm, judge, enumerated, indirect: bool) -> None:
    from baselines.interface import reward_member
    from baselines.transfer_q import transfer_q

    weight = 0.4 if indirect else 1.5  # larger values leave hardly any text to draw
    rewards = [judge(4), judge(9)][: 1 + indirect]
    members = [reward_member(f"reward{i}", reward) for i, reward in enumerate(rewards)]

    def rolled(tokens, length):
        """Return the policy's greedy continuation, from whole forwards."""
        tokens = list(tokens)
        for _ in range(length):
            if enumerated.stop in tokens:
                break
            tokens.append(int(enumerated.logits(lm(2), tokens).argmax()))
        return tokens

    def scores_with(length):
        def scores(tokens):
            z = enumerated.logits(lm(0), tokens)
            found = torch.full_like(z, -torch.inf)
            for candidate in z.topk(4).indices.tolist():
                text = rolled([*tokens, candidate], length)
                r = [reward_of(reward, enumerated, text) for reward in rewards]
                value = torch.tensor(0.5 * (r[0] - r[1])).exp().item() * r[0] if indirect else r[0]
                found[candidate] = z[candidate] + weight * value
            return found

        return enumerated.law(scores)

    def run(prompts, params):
        other = members[1] if indirect else None
        return transfer_q(
            lm(0), lm(2), members[0], prompts, params, policys_reward=other, weight=weight, k=4, rollout=3
        )

    found = enumerated.drawn(run)
    assert enumerated.misfit(scores_with(3), found) < 5
    assert enumerated.misfit(scores_with(0), found) > 5


def test_forwards_of_transfer_q(lm, judge) -> None:
    from baselines.interface import Params, reward_member
    from baselines.transfer_q import transfer_q

    member = reward_member("reward", judge(4))
    (response,) = transfer_q(lm(0), lm(2), member, [[1, 2]], Params(max_new_tokens=2), k=3, rollout=4)
    # One forward for the prompt and one for each token; in each of two steps three rollouts of four forwards, and three
    # rewards.
    assert response.forwards == {"lm0": 2, "lm2": 2 + 2 * 3 * 4, "reward": 2 + 2 * 3}
    for wrong in ({"k": 0}, {"rollout": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=0"):
            transfer_q(lm(0), lm(2), member, [[1]], Params(), **wrong)


def test_rewards_of_prefixes_are_those_of_whole_texts(judge) -> None:
    from baselines.interface import reward_member

    reward = judge(4)
    rows = reward_member("reward", reward).start([[1, 2, 3], [4]])
    found = rows.advance(torch.tensor([[0, 2], [3, 3]]))
    texts = [[1, 2, 3, 0], [1, 2, 3, 0, 2], [4, 3], [4, 3, 3]]
    wanted = torch.tensor([plain_reward(reward, text) for text in texts]).view(2, 2)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found[:, 0] - found[:, 1]).abs().min() > 1e-3


def test_siblings_see_the_text_and_themselves(judge) -> None:
    """Each candidate is scored as if it came alone, over rows of different lengths. The rows continue unchanged."""
    from baselines.interface import reward_member

    reward, prompts, candidates = judge(4), [[1, 2, 3], [1, 4]], torch.tensor([[0, 2, 2], [3, 1, 0]])
    rows = reward_member("reward", reward).start(prompts)
    wanted = torch.tensor(
        [[plain_reward(reward, [*text, c]) for c in each] for text, each in zip(prompts, candidates.tolist())]
    )
    torch.testing.assert_close(rows.siblings(candidates), wanted, atol=1e-5, rtol=1e-4)
    assert rows.forwards.tolist() == [4, 4]
    after = [plain_reward(reward, [*text, 3]) for text in prompts]
    torch.testing.assert_close(rows.advance(torch.tensor([[3], [3]]))[:, 0], torch.tensor(after), atol=1e-5, rtol=1e-4)
