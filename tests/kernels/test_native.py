"""Which C++ core is loaded, and that a core older than its sources gives a warning."""

import os
import subprocess
import sys

import pytest

from genarm_fast.kernels import _native

pytestmark = pytest.mark.skipif(_native.core is None, reason="built without a compiler")


def test_environment_turns_the_core_off():
    code = "from genarm_fast.kernels import _native; print(_native.core is None)"
    env = os.environ | {"GENARM_FAST_ISA": "none"}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == "True"
    )


@pytest.mark.parametrize("isa", [*(_native.core.instruction_sets() if _native.core else []), "none"])
def test_the_instruction_set_in_use_is_told(isa):
    code = "from genarm_fast.kernels import _native; print(_native.instruction_set())"
    env = os.environ | {"GENARM_FAST_ISA": isa}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == isa


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="'mmx': expected one of"):
        _native.core.use("mmx")
    env = os.environ | {"GENARM_FAST_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", "import genarm_fast.kernels"], env=env, capture_output=True, text=True)
    assert f"GENARM_FAST_ISA=mmx: expected none or one of {', '.join(_native.core.instruction_sets())}" in done.stderr


def test_a_core_older_than_its_sources_is_told(tmp_path, recwarn):
    core, source = tmp_path / "_C.so", tmp_path / "csrc" / "common" / "simd.h"
    _native.warn_if_older(core, tmp_path / "csrc")  # a wheel has no sources
    source.parent.mkdir(parents=True)
    for path, time in ((source, 1), (core, 2)):
        path.touch()
        os.utime(path, (time, time))
    _native.warn_if_older(core, tmp_path / "csrc")
    assert not recwarn
    os.utime(source, (3, 3))
    with pytest.warns(RuntimeWarning, match=r"older than common/simd\.h"):
        _native.warn_if_older(core, tmp_path / "csrc")
