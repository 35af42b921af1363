"""Outputs of stacked linears with LoRA lanes, and the outputs of each row's own merged weights."""

import torch

from genarm_fast.kernels import Lanes


def stacked(widths, index, *, rows, inputs=6, rank=3, adapters=2, dtype=torch.float32, seed=0):
    """Return (y, lanes, expected): expected has in float64 what W + B A of each row's adapter gives, [rows,
    sum(widths)].

    index: adapter of each lane, -1 for none; with () there are no lanes.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / 2

    out, parts = sum(widths), len(widths)
    x, weight = normal(rows, inputs), normal(out, inputs)
    if not index:
        y = (x @ weight.T).to(dtype)
        return y, None, y.double()
    a, b = normal(adapters, parts, rank, inputs), normal(adapters, rank, out).to(dtype)
    y = (x @ torch.cat([weight, a.flatten(0, 2)]).T).to(dtype)
    merged = []
    for i in range(rows):
        adapter = index[i * len(index) // rows]
        total = y[i, :out].double().clone()
        if adapter >= 0:
            for part, columns in enumerate(torch.arange(out).split(list(widths))):
                begin = out + (adapter * parts + part) * rank
                total[columns] += y[i, begin : begin + rank].double() @ b[adapter][:, columns].double()
        merged.append(total)
    return y, Lanes(b, torch.tensor(index)), torch.stack(merged)
