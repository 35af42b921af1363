"""Data in other forms: column names, PKU-SafeRLHF, `datasets` objects and folders, malformed rows, swapped
duplicates."""

from __future__ import annotations

import csv
import json
import os

import pytest

from genarm_fast.train import TrainConfig, train
from genarm_fast.train.data import SWAPPED, load_pairs, loading_options

TEXT = {"prompt": "p", "chosen": "a", "rejected": "b"}
SIDES = (("assistant", "yes"), ("assistant", "no"))
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
        load_pairs(path, **loading_options(config(chosen_by=by))).pairs[0]
        for by in ("better_response_id", "safer_response_id")
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
    options = loading_options(config(columns=("prompt=question", "chosen=good", "rejected=bad")))
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


def test_training_on_rows_in_memory(make_config, toy, tmp_path):
    """A `Dataset`, a split of a `DatasetDict`, streamed rows and dicts give the same ARM as the file."""
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in toy.read_text().splitlines()]
    data = datasets.Dataset.from_list(rows)
    splits = datasets.DatasetDict({"train": data, "dev": data.select(range(4))})
    data.save_to_disk(tmp_path / "saved")
    splits.save_to_disk(tmp_path / "splits")
    expected = train(make_config(toy, output=str(tmp_path / "file")), progress=False).report
    given = {
        "dataset": data,
        "split": splits["train"],
        "streamed": data.to_iterable_dataset(),
        "dicts": (row for row in rows),
    }
    for name, source in given.items():
        output = str(tmp_path / name)
        report = train(make_config("", output=output, data_id="toy"), data=source, progress=False).report
        assert report["config"]["data"] == "toy"
        for part in ("data", "steps", "final"):
            assert report[part] == expected[part], (name, part)
    again = train(make_config("", output=str(tmp_path / "dicts")), data=rows, progress=False)
    assert again.report["config"]["data_id"] == "toy", "the run that was there"
    for name in ("saved", "splits"):
        report = train(make_config(tmp_path / name, output=str(tmp_path / f"of-{name}")), progress=False).report
        assert (report["data"], report["final"]) == (expected["data"], expected["final"])
    own = make_config("", output=str(tmp_path / "own"), holdout_every=None)
    held = train(own, data=rows, eval_data=splits["dev"], progress=False).report
    assert (held["config"]["data"], held["data"]["train_pairs"], held["final"]["pairs"]) == ("rows in memory", 48, 4)


def test_rows_in_memory_that_are_none(make_config, toy):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(TypeError, match=r"data: expected rows, got splits \['dev'\]: choose one"):
        train(make_config(""), data=datasets.DatasetDict({"dev": datasets.Dataset.from_list([TEXT])}), progress=False)
    with pytest.raises(TypeError, match=r"data=PosixPath\(.*expected rows, an iterable"):
        train(make_config(""), data=toy, progress=False)
    with pytest.raises(ValueError, match="data line 1: expected a row with named columns, got 'prompt'"):
        train(make_config(""), data=["prompt"], progress=False)
    with pytest.raises(ValueError, match=r"data='.*': expected none in the config where rows are given"):
        train(make_config(toy), data=[TEXT], progress=False)
    with pytest.raises(ValueError, match="data='': expected a non-empty string, or rows given to `train`"):
        train(make_config(""), progress=False)
    with pytest.raises(ValueError, match="holdout_every=4: expected None when eval_data is given"):
        train(make_config(toy), eval_data=[TEXT], progress=False)


def test_rows_of_numpy_and_torch():
    """`Dataset.with_format` gives such rows, and tuples in place of lists."""
    datasets = pytest.importorskip("datasets")
    user, yes, no = ({"role": role, "content": text} for role, text in (("user", "hi"), *SIDES))
    chat = {"prompt": [user], "chosen": [yes], "rejected": [no], "margin": 0.5}
    expected = load_pairs([chat]).pairs
    for form in ("numpy", "torch"):
        assert load_pairs(datasets.Dataset.from_list([chat]).with_format(form)).pairs == expected
    assert load_pairs([{name: (value,) if value is user else value for name, value in chat.items()}]).pairs == expected
    assert load_pairs([{**chat, "prompt": (user,), "chosen": (yes,), "rejected": (no,)}]).pairs == expected


CHAT = {"prompt": [{"role": "user", "content": "p"}], "chosen": "a", "rejected": "b"}
TRANSCRIPT = {side: f"\n\nHuman: p\n\nAssistant: {side}" for side in ("chosen", "rejected")}


@pytest.mark.parametrize(
    ("trained", "held_out", "said"),
    [
        (TEXT, CHAT, "its prompts are chats: expected texts"),
        (CHAT, TEXT, "its prompts are texts: expected chats"),
        (TRANSCRIPT, TEXT, "its prompts are texts: expected transcripts"),
        (TRANSCRIPT, CHAT, "its prompts are chats: expected transcripts"),
    ],
)
def test_held_out_rows_of_another_format(make_config, write_jsonl, trained, held_out, said):
    """Such rows would be read differently from prompts in decoding, and the report would be about them."""
    with pytest.raises(ValueError, match=f"eval_data: {said}, as those that are trained on are"):
        train(make_config("", holdout_every=None), data=[trained], eval_data=[held_out], progress=False)
    path = str(write_jsonl([held_out], "held.jsonl"))
    with pytest.raises(ValueError, match=f"held.jsonl: {said}"):
        train(make_config("", holdout_every=None, eval_data=path), data=[trained], progress=False)


def test_held_out_rows_that_are_read_alike(make_config, tmp_path):
    for number, (trained, held_out, options) in enumerate(
        [(TEXT, TRANSCRIPT, {}), (TEXT, CHAT, {"as_chat": True}), (TRANSCRIPT, CHAT, {"as_chat": True})]
    ):
        config = make_config("", holdout_every=None, output=str(tmp_path / str(number)), **options)
        assert train(config, data=[trained], eval_data=[held_out], progress=False).report["final"]["pairs"] == 1


@pytest.mark.parametrize("name", ["image", "images", "video", "videos", "audio", "audios"])
def test_columns_of_other_media(name):
    with pytest.raises(ValueError, match=f"data line 1: field '{name}': expected texts alone"):
        load_pairs([TEXT | {name: ["x"]}])
    assert len(load_pairs([TEXT | {name: None}]).pairs) == 1


def test_columns_whose_names_are_no_text():
    """A table without a header has such columns."""
    with pytest.raises(ValueError, match=r"field 'chosen' is missing, found \['0', 'a'\]"):
        load_pairs([{0: "x", "a": "y"}])
    with pytest.raises(ValueError, match="expected chosen_by, a column with 0 or 1"):
        load_pairs([{0: 1, "response_0": "y", "response_1": "z"}])


@pytest.mark.parametrize("rows", [TEXT, {"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}])
def test_one_mapping_is_no_rows(rows):
    with pytest.raises(TypeError, match=r"data: expected rows, a list of mappings, got one mapping with \['chosen'"):
        load_pairs(rows)


@pytest.mark.parametrize(
    "option", [{"dataset_split": "test"}, {"dataset_config": "hard"}, {"dataset_dir": "harmless-base"}]
)
def test_what_a_file_has_not_is_refused(make_config, toy, option):
    """The option would have no effect, and the run another data set than asked for."""
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.*: expected none, the data is a file"):
        train(make_config(toy, **option), progress=False)
    with pytest.raises(ValueError, match=f"{name}=.*: expected none, the data is rows"):
        train(make_config("", **option), data=[TEXT], progress=False)


def test_a_saved_data_set_without_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([TEXT]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="dataset_split='test': expected a folder with splits, this is one"):
        load_pairs(str(tmp_path / "saved"), dataset_split="test")


def test_a_pipe_can_not_be_read_again(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"data=.*pipe': expected a file, which a run that goes on can read again"):
        load_pairs(str(tmp_path / "pipe"))


def test_configurations_of_a_data_set(write_jsonl, tmp_path):
    """The README of the data set names the configurations."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("easy", "hard"):
        write_jsonl([TEXT | {"prompt": name}], f"set/{name}.jsonl")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("easy", "hard"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("easy", "hard"):
        found = load_pairs(str(folder), **loading_options(config(dataset_config=name))).pairs
        assert [pair.prompt for pair in found] == [name]
    with pytest.raises(ValueError, match=r"dataset_split='train'.*(?s:.)*easy"):
        load_pairs(str(folder))
    with pytest.raises(ValueError, match="dataset_config='odd'"):
        load_pairs(str(folder), dataset_config="odd")


@pytest.mark.parametrize("form", [json.dumps, str])
def test_a_folder_of_csv_with_messages_in_it(tmp_path, form):
    """pandas and spreadsheets export chats in these forms."""
    pytest.importorskip("datasets")
    chat = {"prompt": [{"role": "user", "content": 'is it, "so"?\nor'}]}
    chat |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (tmp_path / "set").mkdir()
    with open(tmp_path / "set" / "pairs.csv", "w", newline="") as file:
        table = csv.DictWriter(file, chat)
        table.writeheader()
        table.writerow({name: form(value) for name, value in chat.items()})
    assert load_pairs(str(tmp_path / "set")).pairs == load_pairs([chat]).pairs


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
