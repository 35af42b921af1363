"""The comparison with other engines: how processes are asked, what is written, and the shapes that all of them read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from genarm_fast import GenARM

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"
WORKER = """
import sys
sys.path.append({folder!r})
from answering import answer

def load(pace):
    print("noise of a library")
    return lambda prompts, tokens, seed: pace * tokens * len(prompts)

answer(load)
"""


@pytest.fixture
def peers(script):
    return script("peers")


def worker(peers, folder, text):
    path = folder / "worker.py"
    path.write_text(text.format(folder=str(peers.WORKERS)))
    return peers.Peer(str(path), Path(sys.executable), {"pace": 3})


def test_a_process_answers_questions(peers, tmp_path, capfd):
    with peers.Process("fake", worker(peers, tmp_path, WORKER)) as process:
        for tokens in (2, 5):
            answer = process.ask(prompts=[[1], [2]], tokens=tokens, seed=0)
            assert answer["tokens"] == 3 * tokens * 2
            assert answer["wall"] >= 0
            assert answer["cpu"] >= 0
    assert process.process.poll() is not None
    assert "noise of a library" in capfd.readouterr().err


def test_a_process_that_ends_is_an_error(peers, tmp_path):
    with pytest.raises(RuntimeError, match="fake: its process ended with 7"):
        peers.Process("fake", worker(peers, tmp_path, "raise SystemExit(7)"))


def test_times_are_what_peers_report(peers):
    asked = []

    def ask(process, turn):
        asked.append((process, turn))
        return turn * {"a": 1.0, "b": 10.0}[process]

    found = peers.times({"first": "a", "second": "b"}, 2, ask)
    assert found == {"first": [1.0, 2.0], "second": [10.0, 20.0]}
    assert asked == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]


@pytest.mark.parametrize("name", ["of_genarm_fast", "of_transformers"])
def test_workers_make_the_tokens_that_they_are_asked_for(
    name, script, peers, monkeypatch, tiny_model, tokenizer, tmp_path
):
    monkeypatch.syspath_prepend(peers.WORKERS)
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"dtype": "float32"} if name == "of_transformers" else {}
    decode = script(name).load(base=str(tmp_path), threads=torch.get_num_threads(), rows=2, **options)
    assert decode([[5, 6, 7], [8, 9, 10]], 4, 1) == 8


def test_prompts_have_one_length(peers):
    first, second = peers.prompts_of(8, 0), peers.prompts_of(8, 1)
    assert len({len(ids) for ids in first + second}) == 1
    assert first[1] == second[0] != first[0]


def lines(peers):
    spent = {peers.REFERENCE: [2.0, 4.0, 6.0], "ours": [1.0, 1.0, 2.0]}
    return peers.lines_of("step, 1 rows", spent)


def test_ratios_are_taken_within_rounds(peers):
    reference, ours = lines(peers)
    assert reference["times"]["median"] == 1.0
    assert ours["milliseconds"] == 1000.0
    assert ours["times"]["median"] == 3.0  # median of 2, 4 and 3


def test_table(peers):
    about = {"shape": "135m", "date": "2026-11-28", "cores": 2, "device": "CPU", "capability": "AVX2", "threads": 1}
    about |= {"load": 0.5, "clock": "cpu", "rounds": 3}
    text = peers.table({"machine": about, "results": lines(peers)})
    assert "| ours | 1,000.0 (3.00) |" in text.splitlines()
    assert "CPU time, medians of 3 rounds" in text


def test_a_later_run_of_the_day_keeps_the_cases_that_it_does_not_measure(peers):
    def case(name, milliseconds):
        return {"case": name, "contender": "ours", "milliseconds": milliseconds, "times": {"median": 1.0}}

    about = {"shape": "135m", "date": "2026-11-28", "cores": 2, "device": "CPU", "capability": "AVX2", "threads": 1}
    about |= {"load": 0.5, "clock": "cpu", "rounds": 3}
    earlier = {"machine": about, "results": [case("step, 1 rows", 5.0), case("prompt of 1000 tokens", 6.0)]}
    first = peers.with_new(earlier, [case("step, 8 rows", 9.0)], rounds=4)
    assert [(line["case"], line["rounds"]) for line in first] == [
        ("step, 1 rows", 3), ("prompt of 1000 tokens", 3), ("step, 8 rows", 4),
    ]  # fmt: skip
    again = peers.with_new({"machine": about, "results": first}, [case("step, 1 rows", 4.0)], rounds=5)
    assert [(line["milliseconds"], line["rounds"]) for line in again] == [(4.0, 5), (6.0, 3), (9.0, 4)]
    assert "medians of 3 to 5 rounds" in peers.table({"machine": about, "results": again})
    assert peers.with_new(None, [case("step, 1 rows", 4.0)], 5) == [case("step, 1 rows", 4.0) | {"rounds": 5}]


def test_the_page_has_the_newest_tables(peers, monkeypatch, tmp_path):
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text())
    monkeypatch.setattr(peers, "PAGE", copy)
    peers.write()
    assert copy.read_text() == PAGE.read_text()


def test_the_newest_file_of_each_shape_is_written(peers, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- begin peers -->\nold\n<!-- end peers -->\nbelow\n")
    monkeypatch.setattr(peers, "PAGE", page)
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    about = {"shape": "135m", "cores": 2, "device": "CPU", "capability": "AVX2", "threads": 1}
    about |= {"load": 0.5, "clock": "cpu", "rounds": 3}
    for date in ("2026-11-27", "2026-11-28"):
        found = {"machine": about | {"date": date}, "results": lines(peers)}
        (tmp_path / f"peers-135m-{date}.json").write_text(json.dumps(found))
    peers.write()
    text = page.read_text()
    assert "2026-11-28" in text
    assert "2026-11-27" not in text
    other = {"machine": about | {"date": "2026-11-26", "capability": "AVX512"}, "results": lines(peers)}
    (tmp_path / "peers-other.json").write_text(json.dumps(other))
    peers.write()
    assert "2026-11-26" in page.read_text()  # another instruction set has its own table
    assert "2026-11-28" in page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("<!-- end peers -->\nbelow\n")
    assert "old" not in text


def test_a_random_shape_is_one_file_for_all(script, tmp_path, monkeypatch, tokenizer):
    """GenARM holds the shape exactly in 4 bits, and transformers gets the same weights."""
    gguf = pytest.importorskip("gguf")
    shapes = script("peer_shapes")
    like = tmp_path / "like.gguf"
    writer = gguf.GGUFWriter(like, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(64)])
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    monkeypatch.setattr(shapes, "demo_gguf", lambda folder: like)
    shape = shapes.Random("tiny", "tiny", 2, 64, 96, 4, 2)
    options = shape.checkpoint(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    model = GenARM.from_pretrained(
        options["base"],
        gguf_file=options["gguf"],
        tokenizer=tokenizer,
        dtype=torch.bfloat16,
        quantization="exact",
    )
    assert "14 in 4 bits, 1 in 8 bits" in str(model.quantized["base"])


def test_a_run_that_is_cut_keeps_its_cases(peers, monkeypatch, tmp_path):
    def measure(*_, **__):
        yield lines(peers)
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "measure", measure)
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["peers.py", "measure"])
    with pytest.raises(KeyboardInterrupt):
        peers.main()
    (kept,) = tmp_path.glob("peers-135m-1-*.json")
    assert json.loads(kept.read_text())["results"] == [line | {"rounds": 5} for line in lines(peers)]
