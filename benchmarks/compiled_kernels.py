"""Compiles the Triton kernels without a GPU, and reports registers, stack, 128-bit loads and instructions.

    python benchmarks/compiled_kernels.py [--json] [--targets sm_90 gfx942] [--cases '1 ARM']

The real launcher runs on CPU tensors under a stub driver. It binds and compiles each specialisation, but launches
nothing. SASS and its resource usage come from the cuobjdump that the triton wheel bundles. If sm_90 is among the
targets, estimated times on an H100 follow.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from compiled_cases import CASES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass
class Compiled:
    target: str
    case: str
    kernel: str
    registers: int  # per thread
    stack: int  # bytes per thread; above 0 if registers spill
    wide_loads: int  # 128-bit global loads in the code
    loads: int  # all global loads in the code
    # Instructions in the code. scores_kernel has no loop, so one warp issues this number of them for a tile.
    instructions: int
    shared: int  # bytes of shared memory per program


class StubDriver:
    """The part of a Triton driver that binding and compiling use."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)  # a device per target, since triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]


@contextmanager
def compiling_for(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Make launches in the block compile for the target instead of running; yield [(kernel name, compiled kernel)]."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = run(self, *args, warmup=True, **kwargs)
        if all(kernel is not known for _, known in compiled):  # a loop over tiles launches one kernel many times
            compiled.append((self.fn.__name__, kernel))
        return kernel

    driver.set_active(StubDriver(target))
    hip = patch.object(torch.version, "hip", "stub" if TARGETS[target].backend == "hip" else None)
    # No kernel writes its outputs, and the top log-probs gather by sampled tokens: zeros are indices in range.
    with hip, patch.object(JITFunction, "run", compile_only), patch.object(torch, "empty", torch.zeros):
        yield compiled


def cuobjdump(*options: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([str(tool), *options], capture_output=True, text=True, check=True).stdout


def inspect(target: str, case: str, name: str, kernel: Any) -> Compiled:
    if target.startswith("gfx"):
        assembly = kernel.asm["amdgcn"]
        loads = re.findall(r"^\s*(?:global|buffer)_load_(\w+)", assembly, re.M)
        body = assembly.split("s_endpgm")[0]
        return Compiled(
            target,
            case,
            name,
            registers=int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1]),  # type: ignore[index]
            stack=int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", assembly)[1]),  # type: ignore[index]
            wide_loads=sum(load.startswith("dwordx4") for load in loads),
            loads=len(loads),
            instructions=len(re.findall(r"^\s+[sv]_\w+|^\s+(?:global|buffer|ds)_\w+", body, re.M)),
            shared=kernel.metadata.shared,
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, sass = cuobjdump("-res-usage", cubin.name), cuobjdump("-sass", cubin.name)
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", sass, re.M)
    operations = operations[: len(operations) - operations[::-1].index("EXIT")] if "EXIT" in operations else operations
    loads = [operation for operation in operations if operation.startswith("LDG")]
    return Compiled(
        target,
        case,
        name,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        wide_loads=sum(".128" in load for load in loads),
        loads=len(loads),
        instructions=sum(operation != "NOP" for operation in operations),
        shared=kernel.metadata.shared,
    )


def compile_all(targets: list[str], cases: list[str]) -> list[Compiled]:
    found = []
    for target in targets:
        for case in cases:
            with compiling_for(target) as compiled:
                CASES[case]()
            found += [inspect(target, case, name, kernel) for name, kernel in compiled]
    return found


def h100_model(found: list[Compiled], vocab: int = 128256) -> str:
    """Return a Markdown table of estimated, not measured, times of the pass over the logits on an H100.

    With all SMs busy, the pass is bound either by the issue of instructions or by reading memory."""
    issue, memory = 132 * 4 * 1.7e3, 3.35e6  # per µs: warp instructions (SMs x schedulers x MHz), and bytes of HBM3
    lines = [
        "| case | instructions per token | issue, ns per row | memory, ns per row | bound by |",
        "|---|---|---|---|---|",
    ]
    for kernel in found:
        if kernel.target == "sm_90" and kernel.kernel == "scores_kernel" and "50257" not in kernel.case:
            arms = 0 if kernel.case == "base only" else int(kernel.case[0])
            width = 4 if "float32" in kernel.case else 2
            instructions = kernel.instructions / 1024 * vocab
            issued, read = 1e3 * instructions / issue, 1e3 * vocab * (1 + arms) * width / memory
            bound = "issue" if issued > read else "memory"
            per_token = kernel.instructions * 32 / 1024
            lines.append(f"| {kernel.case} | {per_token:.0f} | {issued:.0f} | {read:.0f} | {bound} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown tables")
    arguments = parser.parse_args()
    found = compile_all(arguments.targets, arguments.cases)
    if arguments.json:
        print(json.dumps([asdict(kernel) for kernel in found], indent=1))
        return
    print(
        "| target | case | kernel | registers | stack | 128-bit loads | instructions | shared |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for kernel in found:
        wide = f"{kernel.wide_loads} of {kernel.loads}"
        cells = (kernel.target, kernel.case, kernel.kernel, kernel.registers, kernel.stack, wide)
        print("|", *(f"{cell} |" for cell in (*cells, kernel.instructions, kernel.shared)))
    if "sm_90" in arguments.targets:
        print(f"\n{h100_model(found)}")


if __name__ == "__main__":
    main()
