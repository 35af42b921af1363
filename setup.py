"""Build: maps kernels/ops to genarm_fast.kernels and compiles kernels/csrc into genarm_fast.kernels._C.

Never imports torch, so that isolated builds stay small. The extension is optional: without a compiler the install goes
on with a warning, and the CPU uses the slower PyTorch reference.
"""

import platform
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
LOOPS = glob("kernels/csrc/*_loops.cpp")  # compiled once per instruction set
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"baseline": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma"]
    INSTRUCTION_SETS["avx512"].append("-mprefer-vector-width=512")
    INSTRUCTION_SETS["avx512_bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]


class BuildCore(build_ext):
    """Compiles the loops once per instruction set; which of them runs is chosen at import."""

    def build_extension(self, ext):
        ext.extra_objects = []
        for name, flags in INSTRUCTION_SETS.items():
            if name == "avx512_bf16":
                if not self.compiles(flags):
                    continue
                ext.define_macros.append(("GENARM_AVX512_BF16", "1"))
            ext.extra_objects += self.compiler.compile(
                LOOPS,
                output_dir=f"{self.build_temp}/{name}",
                macros=[*ext.define_macros, ("ISA", name)],
                extra_postargs=[*ext.extra_compile_args, *flags, "-fopenmp-simd"],
            )
        super().build_extension(ext)

    def compiles(self, flags):
        """Whether the compiler knows the flags: avx512bf16 came with GCC 10 and clang 9."""
        source = Path(self.build_temp, "flags.cpp")
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("int main() {}\n")
        try:
            self.compiler.compile([str(source)], output_dir=self.build_temp, extra_postargs=flags)
        except CompileError:
            return False
        return True


setup(
    packages=[*find_packages(include=["genarm_fast", "genarm_fast.*"]), "genarm_fast.kernels"],
    package_dir={"genarm_fast": "genarm_fast", "genarm_fast.kernels": "kernels/ops"},
    package_data={"genarm_fast": ["py.typed", "demo/arms/*/*"]},
    ext_modules=[
        Extension(
            "genarm_fast.kernels._C",
            sorted(set(glob("kernels/csrc/*.cpp")) - set(LOOPS)),
            depends=glob("kernels/csrc/*"),
            define_macros=[("GENARM_X86", "1")] if X86 else [],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildCore},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
