"""Maps kernels/ops to the package genarm_fast.kernels, and compiles kernels/csrc into genarm_fast.kernels._C.

This file never imports torch, so that isolated builds stay small. The extension is optional: without a compiler the
installation continues with a warning, and the CPU uses the slower PyTorch reference.
"""

import platform
from glob import glob

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
CSRC = "kernels/csrc"
LOOPS = glob(f"{CSRC}/*/loops.cpp")  # compiled once per instruction set
ONLY = {  # instruction set -> the loops that are compiled for it; all other loops run their code for avx512
    "avx512vnni": [f"{CSRC}/quant_linear/loops.cpp"],  # has sums of products of integers
    "avx512bf16": [f"{CSRC}/small_linear/loops.cpp"],  # has sums of products of bfloat16
}
KERNELS = ["genarm_fast.kernels", *(f"genarm_fast.kernels.{op}" for op in find_packages("kernels/ops"))]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARMS = find_namespace_packages(include=["genarm_fast.demo.arms.*"])  # folders that hold only data
INSTRUCTION_SETS = {"baseline": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"].append("-mprefer-vector-width=512")
    INSTRUCTION_SETS |= {name: [*INSTRUCTION_SETS["avx512"], f"-m{name}"] for name in ONLY}


class BuildCore(build_ext):
    """A build_ext that compiles the loops once per instruction set. The import chooses which of them run."""

    def build_extension(self, ext):
        ext.extra_objects = []
        for name, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                ONLY.get(name, LOOPS),
                output_dir=f"{self.build_temp}/{name}",
                include_dirs=ext.include_dirs,
                macros=[*ext.define_macros, ("ISA", name)],
                extra_postargs=[*ext.extra_compile_args, *flags, "-fopenmp-simd"],
            )
        super().build_extension(ext)


setup(
    packages=[*find_packages(include=["genarm_fast", "genarm_fast.*"]), *KERNELS, *ARMS],
    package_dir={"genarm_fast": "genarm_fast", "genarm_fast.kernels": "kernels/ops"},
    package_data={"genarm_fast": ["py.typed"], **{arm: ["*"] for arm in ARMS}},
    ext_modules=[
        Extension(
            "genarm_fast.kernels._C",
            sorted(set(glob(f"{CSRC}/**/*.cpp", recursive=True)) - set(LOOPS)),
            depends=glob(f"{CSRC}/**/*.h", recursive=True) + LOOPS,
            include_dirs=[CSRC],
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
