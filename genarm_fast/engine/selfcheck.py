"""Self-check: before a model runs over genarm_fast's cache, its logits are compared with transformers' plain forward.

No config tells what a model's attention does besides calling transformers' attention function, or where it takes
positions from. So rows of unequal length are prefilled, fed a block, rolled back and fed another block, in 4 forwards
of at most 8 tokens. The check does not see effects that begin after 8 tokens, such as longer attention windows.

If layers differ by their weights alone, one layer of each kind is checked for all; but only a check of the whole model
can refuse it. The verdict depends on code and shapes. A model that has passed is not compared again in this process,
nor in a later one, which finds a record on disk.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from genarm_fast.device.base import no_autocast, out_of_memory
from genarm_fast.engine.layer_kinds import kinds_of_layers, member_of_layers
from genarm_fast.engine.model_runner import ModelRunner, in_one_forward, model_of
from genarm_fast.engine.verdict_key import verdict_key
from genarm_fast.models.kv_cache import Entry
from genarm_fast.models.member import Member
from genarm_fast.models.weights import share_weights
from genarm_fast.utils.checks import check_integer
from genarm_fast.utils.records import read_record, write_record

POLICY_VARIABLE = "GENARM_FAST_SELFCHECK"
MAX_ENTRY_SIZE = 1 << 20  # largest number of heads, or size of a head, that a record may have
POLICIES = ("once", "always", "never")  # the first one is the default
ROW_TOKENS = 8  # tokens of a row
# Largest deviations of a right model, in standard deviations of the logits.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 0.02, torch.float16: 0.06}
COARSE_TOLERANCE = 0.15  # tolerance for bfloat16, and for quantised models, whose rounding may depend on the batch
# Tolerances for a part of the layers are smaller, since errors add up. SmolLM2-135M in float32, with attention scaled
# by 1.01, is off by 0.009 with 2 of 30 layers and by 0.03 with all. Right models were off by at most 2e-4 (float32),
# 2e-3 (float16) and 0.06 (other dtypes).
PART_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-4, torch.float16: 4e-3}
COARSE_PART_TOLERANCE = 0.06
# A sensitive model may be off by this multiple of its `sensitivity`, and by MAX_TOLERANCE at most.
# Wrong models are off by 1.
SENSITIVITY_FACTOR = 4
MAX_TOLERANCE = 0.5
# Times that a model is compared. Rounding in a batch can change which expert wins narrowly; a wrong model always fails.
TRIES = 4

_entries_by_model: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], list[Entry | None]]] = WeakKeyDictionary()


def check_models(members: Sequence[Member], draft_model: Member | None = None) -> None:
    """Check all models, one per forward, so that `entries_of` is known later. Raises the same ValueError."""
    groups = [[members[i] for i in group] for group in in_one_forward(members)]
    for group in (*groups, *([] if draft_model is None else [[draft_model]])):
        entries_of(group)


@torch.inference_mode()
def entries_of(members: Sequence[Member]) -> list[Entry | None]:
    """Return what each layer caches of a token, for members of one forward; None for a layer that caches nothing.

    Raises:
        ValueError: a model gives other logits over genarm_fast's cache than without one, or does not run over it.
    """
    found = _entries_by_model.setdefault(model_of(members), {})
    lanes = tuple(member.lane for member in members)
    if lanes not in found:
        policy = self_check_policy()
        key = None if policy == "always" else verdict_key(members)
        entries = None if key is None else _read_entries(key, members[0])
        if entries is None:
            if policy == "never":
                entries = _discover_entries(members)
            else:
                entries = _check_by_kinds(members) or _check_all_layers(members)
            if key is not None and policy == "once":
                _write_entries(key, members[0], entries)
        found[lanes] = entries
    return found[lanes]


def self_check_policy() -> str:
    """Return when models are compared, one of POLICIES, from the environment. Raises ValueError for other words."""
    policy = os.environ.get(POLICY_VARIABLE) or POLICIES[0]
    if policy not in POLICIES:
        raise ValueError(f"{POLICY_VARIABLE}={policy!r}: expected one of {', '.join(POLICIES)}")
    return policy


def _check_by_kinds(members: Sequence[Member]) -> list[Entry | None] | None:
    """Compare one layer of each kind, and the last layer. Returns all entries, or None if this proves too little."""
    kind_of = kinds_of_layers([member.model for member in members], model_of(members))
    if kind_of is None:
        return None
    kept = sorted({kind_of.index(kind) for kind in kind_of} | {len(kind_of) - 1})
    if len(kept) == len(kind_of):
        return None
    parts = [member_of_layers(member, kept) for member in members]
    runner = _discovering_runner(parts)
    try:
        errors = deviations(parts, runner, 0)
    except Exception as error:
        if out_of_memory(error):
            raise
        return None
    limits = [PART_TOLERANCE.get(member.model.dtype, COARSE_PART_TOLERANCE) for member in members]
    if not all(error <= limit for error, limit in zip(errors, limits)):
        return None
    found = {kind_of[i]: runner.layers[i].entry for i in kept}
    alike = all(found[kind_of[i]] == runner.layers[i].entry for i in kept)
    return [found[kind] for kind in kind_of] if alike else None


def _check_all_layers(members: Sequence[Member]) -> list[Entry | None]:
    """Compare all layers of all members, and return the entries. Raises ValueError if a member fails each time."""
    runner = _discovering_runner(members)
    wrong: dict[int, float] = dict.fromkeys(range(len(members)), 0.0)
    for seed in range(TRIES):
        errors = deviations(members, runner, seed)
        wrong = {i: errors[i] for i in wrong if not errors[i] <= allowed_deviation(members[i], errors[i], seed)}
        if not wrong:
            return [layer.entry for layer in runner.layers]
    i, error = next(iter(wrong.items()))
    raise ValueError(f"{refusal(members[i])} (they are {error:.2g} standard deviations off), so that it can't be run")


def _discover_entries(members: Sequence[Member]) -> list[Entry | None]:
    """Run one token through each member, without a comparison, and return the entries."""
    runner = _discovering_runner(members)
    zeros = torch.zeros(len(members), 1, 1, dtype=torch.long)
    runner.prefill(zeros, zeros, [0], 1, range(len(members)))
    return [layer.entry for layer in runner.layers]


def _discovering_runner(members: Sequence[Member]) -> ModelRunner:
    """Return a runner whose layers find out what they cache when they first run."""
    runner = ModelRunner(members)
    runner.refresh()
    runner.discover(3, ROW_TOKENS)
    return runner


def _write_entries(key: str, member: Member, entries: list[Entry | None]) -> None:
    lines = [None if e is None else [e.heads, *e.widths, str(e.dtype).removeprefix("torch.")] for e in entries]
    if all(entry is None or entry.device == member.device for entry in entries):
        write_record("selfcheck", key, {"model": type(member.model).__name__, "layers": lines})


def _read_entries(key: str, member: Member) -> list[Entry | None] | None:
    """Return the entries of a record on disk; None if there is no valid one."""
    layers = (read_record("selfcheck", key) or {}).get("layers")
    count = member.model.config.get_text_config().num_hidden_layers
    if not isinstance(layers, list) or len(layers) != count:
        return None
    try:
        return [None if layer is None else _entry(*layer, device=member.device) for layer in layers]
    except (TypeError, ValueError):
        return None


def _entry(heads: object, keys: object, values: object, dtype: object, *, device: torch.device) -> Entry:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype={dtype!r}: expected a name of torch's")
    sizes = [check_integer("entry", size, "an integer >= 1", 1, high=MAX_ENTRY_SIZE) for size in (heads, keys, values)]
    return Entry(sizes[0], (sizes[1], sizes[2]), kind, device)


def token_bytes(members: Sequence[Member]) -> int:
    """Return the bytes that the caches of members of one forward take for one token."""
    return len(members) * sum(entry.bytes for entry in entries_of(members) if entry is not None)


def refusal(member: Member) -> str:
    return (
        f"{member.name}: the {member.model.config.model_type} model does not give the same logits over a static cache"
        " as without one"
    )


def tolerance(member: Member) -> float:
    quantised = getattr(member.model, "is_quantized", False)
    return COARSE_TOLERANCE if quantised else TOLERANCE.get(member.model.dtype, COARSE_TOLERANCE)


def allowed_deviation(member: Member, error: float, seed: int) -> float:
    """Return how far off a member's logits may be. Its sensitivity is measured only if the usual limit is exceeded."""
    usual = tolerance(member)
    return usual if error <= usual else max(usual, min(SENSITIVITY_FACTOR * sensitivity(member, seed), MAX_TOLERANCE))


def sensitivity(member: Member, seed: int) -> float:
    """Return how far a sequence's logits move, in standard deviations, by changes that should not matter.

    There are two trials, and the larger movement counts. In one, a second sequence runs beside the first: that changes
    logits if activations are quantised by the largest of all. In the other, embeddings are rounded otherwise: that
    changes them in deep models of low precision.
    """
    tokens = _random(member.vocab_size, (2, ROW_TOKENS), seed).to(member.device)
    together, alone = _plain_logits(member, tokens)[0], _plain_logits(member, tokens[:1])[0]

    def nudge(module: nn.Module, _: Any, embedded: Tensor) -> Tensor:
        noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(seed)).to(embedded.device)
        return embedded + embedded * noise.to(embedded.dtype) * (torch.finfo(embedded.dtype).eps / 2)

    handle = member.model.get_input_embeddings().register_forward_hook(nudge)
    try:
        nudged = _plain_logits(member, tokens[:1])[0]
    finally:
        handle.remove()
    return max(_deviation(other, plain) for others in (together, nudged) for other, plain in zip(others, alone))


def deviations(members: Sequence[Member], runner: ModelRunner, seed: int) -> list[float]:
    """Return each member's largest root mean square difference at any position, in standard deviations there."""
    vocab_size = min(member.vocab_size for member in members)
    tokens = _random(vocab_size, (len(members), 2, ROW_TOKENS), seed).to(members[0].device)
    expected = [_plain_logits(member, own) for member, own in zip(members, tokens)]
    try:
        found = _logits_over_cache(runner, tokens, vocab_size)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"{refusal(members[0])}: {error}") from error
    return [
        max(_deviation(ours, plain[row, position]) for row, position, ours in pieces)
        for plain, pieces in zip(expected, found)
    ]


def _random(vocab_size: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def _plain_logits(member: Member, tokens: Tensor) -> Tensor:
    """Return the logits [R, n, V] of a member's own forward, without a cache. Raises ValueError if it fails."""
    # A caller may have put its model into training mode; a copy over the same weights is in eval mode.
    model = share_weights(member.model) if member.model.training else member.model
    try:
        with no_autocast():
            return model(input_ids=tokens, use_cache=False).logits
    except Exception as error:  # no weights, weights of several dtypes, a config that does not fit them, ...
        if out_of_memory(error):
            raise
        raise ValueError(
            f"{member.name}: expected a model that runs, its own forward raised {type(error).__name__}: {error}"
        ) from error


def _logits_over_cache(runner: ModelRunner, tokens: Tensor, vocab_size: int) -> list[list[tuple[int, int, Tensor]]]:
    """Return (row, position, logits [V]) for each lane, from tokens [L, 2, 8] that are fed as in decoding."""
    slots = [2, 0]
    wrong = (tokens + 1) % vocab_size
    padded, drafted = tokens.clone(), tokens.clone()
    padded[:, 1, 3] = wrong[:, 1, 3]  # the second prompt is shorter
    drafted[:, 0, 5:7] = wrong[:, 0, 5:7]  # the first row's drafts are not accepted
    positions = torch.arange(4, device=tokens.device).expand(*tokens.shape[:2], 4)
    runner.prefill(padded[..., :4], positions, slots, 4, range(len(tokens)))
    seen: list[list[tuple[int, int, Tensor]]] = [[] for _ in runner.lanes]
    for block, starts, right in ((drafted, (4, 3), (1, 3)), (tokens, (5, 5), (3, 3))):
        positions = torch.tensor(starts, device=tokens.device)[:, None] + torch.arange(3, device=tokens.device)
        positions = positions.expand(len(tokens), -1, -1)
        logits = runner.forward(block.gather(-1, positions), positions, slots, ROW_TOKENS, range(len(tokens)))
        for pieces, lane in zip(seen, logits):
            pieces += [(row, starts[row] + j, lane[row, j]) for row in range(2) for j in range(right[row])]
    return seen


def _deviation(ours: Tensor, plain: Tensor) -> float:
    """Return the root mean square difference of two rows of logits, in standard deviations of the plain ones.

    Only tokens with finite plain logits count: a member may mask tokens, or give NaN by itself.
    """
    plain = plain.to(ours.device)
    sound = plain.isfinite()
    ours, plain = ours[sound].float(), plain[sound].float()
    if not len(plain):
        return 0.0
    scale = plain.std(correction=0).clamp_min(1e-3)
    return float((ours - plain).square().mean().sqrt() / scale)
