"""Preference pairs from JSON lines, `datasets` or rows in memory: reading, counting, and the held-out split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genarm_fast.text.transcripts import is_transcript
from genarm_fast.train.config import TrainConfig
from genarm_fast.train.formats import Pair, parse
from genarm_fast.train.rows import Dropped
from genarm_fast.utils.jsonlines import located, read_objects
from genarm_fast.utils.pipes import is_pipe

CUT = "human turn at the end cut, kept"
SEVERAL = "several messages in a response, kept"
SWAPPED = "also there with chosen and rejected swapped, kept"
SPLIT = "train"  # split that is read if the caller names none
DATASET_FOLDER_MARKS = ("state.json", "dataset_dict.json")  # files that mark a folder of `save_to_disk`
TABLE_ENDINGS = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx")  # endings of files that hold tables, not JSON lines


@dataclass
class Pairs:
    """The pairs of one source. `dropped` counts the reasons for dropped rows."""

    format: str
    pairs: list[Pair]
    dropped: Counter[str]
    rows: int

    @property
    def transcripts(self) -> bool:
        """Whether all prompts are transcripts."""
        return prompt_kind(self.pairs) == "transcripts"


def prompt_kind(pairs: Iterable[Pair]) -> str:
    """Return the kind of a source's prompts: "chats", "transcripts" if all of them are, or "texts"."""
    prompts = [pair.prompt for pair in pairs]
    if any(not isinstance(prompt, str) for prompt in prompts):
        return "chats"
    return "transcripts" if all(is_transcript(str(prompt)) for prompt in prompts) else "texts"


def loading_options(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of `load_pairs` about the data's rows."""
    return {
        "columns": dict(each.split("=", 1) for each in config.columns),
        "chosen_by": config.chosen_by,
        "on_bad_row": config.on_bad_row,
        "dataset_split": config.dataset_split,
        "dataset_dir": config.dataset_dir,
        "dataset_config": config.dataset_config,
    }


def load_pairs(
    source: str | Iterable[Mapping[str, Any]],
    *,
    dataset_split: str = SPLIT,
    dataset_dir: str | None = None,
    dataset_config: str | None = None,
    columns: Mapping[str, str] | None = None,
    chosen_by: str | None = None,
    on_bad_row: str = "error",
    name: str = "data",
) -> Pairs:
    """Read every row. The first row decides the format: "text", "implicit", "messages" or "transcript".

    Args:
        source: a file, a folder, a `datasets` id, or rows, for example a `datasets.Dataset`.
        columns: the data's own names of columns, for example {"prompt": "question"}.
        chosen_by: a column with 0 or 1, which tells which of the columns response_0 and response_1 is chosen.
        on_bad_row: "error", or "drop": count a malformed row and continue.
        name: the name of the argument `source` in errors.

    Raises:
        ValueError: a malformed row, naming source, line and field; no usable pair.
    """
    title = source if isinstance(source, str) else name
    format = ""
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    seen: set[bytes] = set()
    rows = 0
    for number, row in _rows(name, source, dataset_split, dataset_dir, dataset_config):
        try:
            with located(title, number):
                format, pair = parse(rows, row, columns or {}, chosen_by, format)
                if pair.content_hash in seen:
                    raise Dropped("duplicate")
                dropped.update([SWAPPED] * (pair.swapped_hash in seen))
                seen.add(pair.content_hash)
                dropped.update([CUT] * pair.trimmed + [SEVERAL] * pair.several)
                pairs.append(replace(pair, line=number))
        except Dropped as reason:
            dropped[str(reason)] += 1
        except ValueError:
            if on_bad_row != "drop":
                raise
            dropped["malformed row"] += 1
        rows += 1
    if not pairs:
        raise ValueError(f"{title}: expected preference pairs, found none usable in {rows} rows ({dict(dropped)})")
    return Pairs(format, pairs, dropped, rows)


def split_pairs(
    pairs: list[Pair], config: TrainConfig, eval_rows: Iterable[Mapping[str, Any]] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """Return training pairs and held-out pairs. The split depends only on rows or prompts, so all callers agree.

    When the split is by hash, all pairs of one prompt are on the same side. eval_rows: held-out rows, in place of
    `eval_data`.
    """
    held_out = config.eval_data if eval_rows is None else eval_rows
    if held_out is not None:
        return pairs, load_pairs(held_out, **loading_options(config), name="eval_data").pairs
    held = [pair for pair in pairs if is_held_out(pair, config)]
    return [pair for pair in pairs if not is_held_out(pair, config)], held


def is_held_out(pair: Pair, config: TrainConfig) -> bool:
    if config.holdout_every is not None:
        return pair.row % config.holdout_every == 0
    digest = hashlib.sha256(f"{config.seed}\0{pair.key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.holdout_fraction * 2**64


def _rows(
    name: str,
    source: str | Iterable[Mapping[str, Any]],
    dataset_split: str,
    dataset_dir: str | None,
    dataset_config: str | None,
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not isinstance(source, str):
        if isinstance(source, Mapping) and {"chosen", "rejected"} & set(source):
            raise TypeError(f"{name}: expected rows, a list of mappings, got one mapping with {sorted(source)}")
        if isinstance(source, Mapping):  # a DatasetDict
            raise TypeError(f"{name}: expected rows, got splits {sorted(source)}: choose one of them")
        if not isinstance(source, Iterable):
            raise TypeError(f"{name}={source!r:.60}: expected rows, an iterable of mappings")
        yield from enumerate(source, 1)
    elif is_pipe(Path(source)):
        raise ValueError(f"{name}={source!r}: expected a file, which a run that goes on can read again, got a pipe")
    elif Path(source).is_file():
        if source.endswith(TABLE_ENDINGS):
            raise ValueError(f"{name}={source!r}: expected JSON lines, or a folder of such tables, for `datasets`")
        yield from read_objects(source)
    elif source.endswith((".jsonl", ".json", ".gz", *TABLE_ENDINGS)):
        raise ValueError(f"{name}={source!r}: expected a file that exists, or a `datasets` id")
    else:
        from datasets import load_dataset, load_from_disk

        folder = Path(source, dataset_dir or "")
        try:
            if any((folder / file).is_file() for file in DATASET_FOLDER_MARKS):
                saved = load_from_disk(str(folder))
                if not isinstance(saved, dict) and name == "data" and dataset_split != SPLIT:
                    raise ValueError("expected a folder with splits, this is one")
                rows = saved[dataset_split] if isinstance(saved, dict) else saved
            else:
                rows = load_dataset(source, dataset_config, data_dir=dataset_dir, split=dataset_split)
        except KeyError as error:
            raise ValueError(f"{name}={source!r}: dataset_split={dataset_split!r}: expected a split of it") from error
        except (ValueError, OSError) as error:  # no data there, no such split, or the hub out of reach
            which = f"dataset_config={dataset_config!r}, dataset_split={dataset_split!r}"
            raise ValueError(f"{name}={source!r}, {which}: {error}") from error
        yield from enumerate(rows, 1)
