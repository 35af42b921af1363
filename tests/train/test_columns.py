"""Data as others name it: columns, PKU-SafeRLHF, `datasets` objects and folders, malformed rows, swapped duplicates."""

from __future__ import annotations

import pytest

from genarm_fast.train import TrainConfig
from genarm_fast.train.data import SWAPPED, load_pairs, reading

TEXT = {"prompt": "p", "chosen": "a", "rejected": "b"}
PKU = {
    "prompt": "how?",
    "response_0": "so",
    "response_1": "no",
    "is_response_0_safe": False,
    "better_response_id": 0,
    "safer_response_id": 1,
}


def config(**options):
    return TrainConfig(base="b", data="d", output="o", **options)


def test_two_objectives_of_one_file(write_jsonl):
    path = str(write_jsonl([PKU]))
    found = [
        load_pairs(path, **reading(config(chosen_by=by))).pairs[0] for by in ("better_response_id", "safer_response_id")
    ]
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in found] == [("how?", "so", "no"), ("how?", "no", "so")]
    with pytest.raises(ValueError, match="expected chosen_by, better_response_id or safer_response_id"):
        load_pairs(path)
    for wrong in (2, None, "1", 1.0):
        bad = str(write_jsonl([PKU | {"safer_response_id": wrong}], "bad.jsonl"))
        with pytest.raises(ValueError, match="line 1: field 'safer_response_id': expected 0 or 1, got"):
            load_pairs(bad, chosen_by="safer_response_id")
    with pytest.raises(ValueError, match="field 'best' is missing, found"):
        load_pairs(path, chosen_by="best")


def test_columns_of_other_names(write_jsonl):
    path = str(write_jsonl([{"question": "q", "good": "a", "bad": "b", "prompt": "not this"}]))
    options = reading(config(columns=("prompt=question", "chosen=good", "rejected=bad")))
    (pair,) = load_pairs(path, **options).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "a", "b")
    with pytest.raises(ValueError, match=r"field 'answer' \(chosen\) is missing, found"):
        load_pairs(path, columns={"chosen": "answer"})
    for wrong in ("prompt", "id=x"):
        with pytest.raises(ValueError, match=r"columns=.*expected NAME=COLUMN each"):
            config(columns=(wrong,))


def test_objects_and_folders_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([TEXT, TEXT | {"prompt": "q"}])
    assert [pair.prompt for pair in load_pairs(data).pairs] == ["p", "q"]
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"dev": data.select([1])}).save_to_disk(tmp_path / "splits")
    assert [pair.prompt for pair in load_pairs(str(tmp_path / "saved")).pairs] == ["p", "q"]
    assert [pair.prompt for pair in load_pairs(str(tmp_path / "splits"), dataset_split="dev").pairs] == ["q"]
    with pytest.raises(ValueError, match="dataset_split='train': expected a split of it"):
        load_pairs(str(tmp_path / "splits"))
    with pytest.raises(TypeError, match=r"expected rows, got splits \['dev'\]"):
        load_pairs(datasets.DatasetDict({"dev": data}))


def test_malformed_rows_are_dropped_and_counted_if_asked(write_jsonl):
    path = str(
        write_jsonl([{"prompt": "p"}, TEXT, TEXT | {"chosen": 3}, {"prompt": "p", "chosen": [], "rejected": []}])
    )
    loaded = load_pairs(path, on_bad_row="drop")
    assert (loaded.format, len(loaded.pairs), dict(loaded.dropped), loaded.rows) == ("text", 1, {"malformed row": 3}, 4)
    with pytest.raises(ValueError, match="line 1: field 'chosen' is missing"):
        load_pairs(path)


def test_a_pair_that_is_there_the_other_way_round_is_counted(write_jsonl):
    swapped = {"prompt": "p", "chosen": "b", "rejected": "a"}
    loaded = load_pairs(str(write_jsonl([TEXT, swapped, TEXT, TEXT | {"prompt": "q"}])))
    assert len(loaded.pairs) == 3
    assert loaded.dropped == {SWAPPED: 1, "duplicate": 1}
