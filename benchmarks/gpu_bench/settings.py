"""The sizes of a run: the real ones, and toy sizes for a trial without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

HEADS_8B = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
REAL_SHAPES: dict[str, dict[str, Any]] = {
    "8b": HEADS_8B | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "1b": HEADS_8B
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
TOY = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300, "hidden_size": 32}
TOY_SHAPES: dict[str, dict[str, Any]] = {
    "8b": TOY | {"intermediate_size": 64, "num_hidden_layers": 1},
    "1b": TOY | {"intermediate_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": True},
    "135m": TOY | {"intermediate_size": 48, "num_hidden_layers": 1, "tie_word_embeddings": True},
}


class Job(NamedTuple):
    """Rows whose kernels one process compiles before they are measured. changes: of the setting, while it compiles."""

    rows: tuple[str, ...]
    changes: dict[str, Any] = {}  # noqa: RUF012

    @property
    def name(self) -> str:
        return ", ".join(
            [*self.rows, *(f"{name} = {value}" for name, value in self.changes.items() if name != "shapes")]
        )


@dataclass(frozen=True)
class Setting:
    """Sizes of a run.

    shapes: config values of the random Llamas, by name. rank: rank of their LoRAs. context: prompt tokens of a decode
    row. tokens: two numbers of new tokens; a row measures the difference of their times. hf_tokens: the same for rows
    of Hugging Face. rounds: measurements of a decode row. repeats: measurements of a kernel. texts: number of texts
    that are compared with the reference, and tokens of each. batches: requests of the decode rows. long_context,
    first_token: prompt tokens of the rows with these names. widened: parameters of the widened base and ARM. drafts:
    values of K. sampler_rows, sampler_vocab: values of R and V in the sampler's table. sampler_calls: calls of the
    sampler from Python, at least. training: N, T, H and V of the loss. cold_bytes: bytes that the sampler's inputs
    fill together, more than a cache holds. read_bytes: bytes that are read to measure the speed behind W.
    test_seconds: time limit of the tests marked gpu and of the jobs beside them. tests: their files. shards: most
    processes that run them. jobs: see `Job`. compile_options: options of Hugging Face's compiled row.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    shapes: dict[str, dict[str, Any]]
    rank: int
    context: int
    tokens: tuple[int, int]
    hf_tokens: tuple[int, int]
    rounds: int
    repeats: int
    texts: tuple[int, int]
    batches: tuple[int, int, int]
    long_context: int
    first_token: int
    widened: tuple[float, float]
    drafts: tuple[int, ...]
    sampler_rows: tuple[int, ...]
    sampler_vocab: tuple[int, ...]
    sampler_calls: int
    training: tuple[int, int, int, int]
    cold_bytes: int
    read_bytes: int
    test_seconds: float
    tests: tuple[str, ...]
    shards: int
    jobs: tuple[Job, ...]
    compile_options: dict[str, Any]

    def shallow(self, changes: dict[str, Any]) -> Setting:
        """Return a setting with models of one layer and one measurement, which compiles the same kernels sooner."""
        shapes = {name: shape | {"num_hidden_layers": 1} for name, shape in self.shapes.items()}
        few: dict[str, Any] = {"shapes": shapes, "rounds": 1, "repeats": 1, "sampler_calls": 1, "read_bytes": 1 << 22}
        few |= {"texts": (1, self.texts[1] // 4), "cold_bytes": 1 << 12}
        return replace(self, **(few | changes))


GPU_TESTS = (  # the order in which a shard runs them until its time is up
    "tests/engine/test_gpu_engine.py",
    "tests/kernels/test_decoder_layer_gpu.py",
    "tests/kernels/settle/test_settle_gpu.py",
    "tests/kernels/ngram_lookup/test_ngram_lookup_gpu.py",
    "tests/kernels/small_linear/test_few_rows_gpu.py",
    "tests/kernels/arm_logps/test_arm_logps_gpu.py",
    "tests/kernels/guided_sample/test_guided_sample_gpu.py",
    "tests/kernels/ragged_attention/test_ragged_attention_gpu.py",
)
LORA_ROWS = ("1 LoRA", "1 LoRA, 8 requests", "1 LoRA, 32 requests", "context 4,000, 8 requests")
JOBS = (  # the jobs that take longest come first
    Job(("Hugging Face, compiled",), {"shapes": REAL_SHAPES}),  # needs all layers, since they form one graph
    Job(("tokens, widened", "drafts")),
    Job(LORA_ROWS),
    # Triton compiles other kernels for one row, for a multiple of 16 rows, and for other numbers of rows.
    Job(("sampler",), {"sampler_rows": (1,)}),
    Job(("sampler",), {"sampler_rows": (8,)}),
    Job(("sampler",), {"sampler_rows": (64,)}),
    Job(("first token", "profile")),
    Job(("2 LoRAs",)),
    Job(("8B + 1B ARM",)),
    Job(("135M", "135M, 1 LoRA")),
    Job(("tokens, SmolLM2",)),
)

REAL = Setting(
    name="real",
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
    shapes=REAL_SHAPES,
    rank=16,
    context=128,  # stays within one KV bound, 256, with the 128 new tokens
    tokens=(32, 128),
    hf_tokens=(16, 64),  # takes 28 ms a token; a longer measurement shows no smaller figure
    rounds=3,
    repeats=5,
    texts=(4, 48),
    batches=(1, 8, 32),
    long_context=4000,
    first_token=2048,
    widened=(7.5e9, 1e9),
    drafts=(2, 4),
    sampler_rows=(1, 8, 64, 128, 256),
    sampler_vocab=(128256,),  # each further vocabulary costs 100 s of compilation
    sampler_calls=32,
    training=(4, 512, 4096, 128256),
    cold_bytes=200 << 20,  # exceeds the 50 MB of an H100's L2 cache
    read_bytes=2 << 30,
    test_seconds=90,
    tests=GPU_TESTS,
    shards=8,
    jobs=JOBS,
    compile_options={},
)

DRY = Setting(
    name="dry",
    device=torch.device("cpu"),
    dtype=torch.float32,  # Triton's interpreter multiplies bit patterns of bfloat16
    shapes=TOY_SHAPES,
    rank=2,
    context=6,
    tokens=(1, 2),  # suffices in three calls to capture the third step of a shape and replay two
    hf_tokens=(1, 2),
    rounds=1,
    repeats=1,
    texts=(1, 4),
    batches=(1, 2, 2),
    long_context=10,
    first_token=8,
    widened=(1e5, 3e4),
    drafts=(2,),
    sampler_rows=(2,),
    sampler_vocab=(300,),
    sampler_calls=1,
    training=(1, 3, 8, 300),
    cold_bytes=1 << 12,  # room for two sets of inputs
    read_bytes=1 << 22,
    test_seconds=300,
    tests=GPU_TESTS[2:3],
    shards=1,
    jobs=(Job(("135M",)),),
    compile_options={"backend": "eager", "mode": None, "fullgraph": False},
)
