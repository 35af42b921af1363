"""ngram_lookup on a GPU, in Triton: one program for each row; the maths are in reference.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import dense, in_memory, launching_on

BLOCK, WARPS = 1024, 4
END_BITS = tl.constexpr(40)  # low bits of a rank, which hold an end; the bits above hold the number of matching tokens
END_MASK = tl.constexpr((1 << 40) - 1)


@triton.jit
def lookup_kernel(
    p_tokens, s_tokens, p_lengths, p_drafts, width, k,
    MAX_N: tl.constexpr, MIN_N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(p_lengths + row).to(tl.int64), width)
    p_tokens += row * s_tokens
    b_best = tl.full([BLOCK], -1, tl.int64)
    for start in range(0, length, BLOCK):
        o_ends = start + tl.arange(0, BLOCK).to(tl.int64)
        b_alive = o_ends < length
        b_matched = tl.zeros([BLOCK], tl.int64)
        for j in tl.static_range(MAX_N):
            m_last = length - 1 - j >= 0
            last = tl.load(p_tokens + length - 1 - j, mask=m_last, other=0)
            m_before = b_alive & (o_ends - 1 - j >= 0)
            b_before = tl.load(p_tokens + o_ends - 1 - j, mask=m_before, other=0)
            b_alive = m_before & m_last & (b_before == last)
            b_matched += b_alive.to(tl.int64)
        b_best = tl.maximum(b_best, tl.where(b_matched >= MIN_N, (b_matched << END_BITS) | o_ends, -1))
    best = tl.max(b_best, axis=0)
    end = best & END_MASK
    period = tl.where(best < 0, 1, length - end)
    o_drafts = tl.arange(0, BLOCK_K).to(tl.int64)
    m_drafts = o_drafts < k
    b_drafts = tl.load(p_tokens + end + o_drafts % period, mask=m_drafts & (best >= 0), other=-1)
    tl.store(p_drafts + row * k + o_drafts, b_drafts.to(tl.int64), mask=m_drafts)


def launch(tokens: Tensor, lengths: Tensor, k: int, max_n: int, min_n: int) -> Tensor:
    """Launch the kernel for checked arguments."""
    rows, width = tokens.shape
    drafts = torch.empty(rows, k, dtype=torch.int64, device=tokens.device)
    if not drafts.numel():
        return drafts
    tokens = dense(tokens)
    with launching_on(tokens.device):
        lookup_kernel[(rows,)](
            tokens, tokens.stride(0), in_memory(lengths).contiguous(), drafts, width, k,
            MAX_N=max_n, MIN_N=min_n, BLOCK=BLOCK, BLOCK_K=triton.next_power_of_2(k), num_warps=WARPS,
        )  # fmt: skip
    return drafts
