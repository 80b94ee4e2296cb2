"""``alignkit data``: the numbers of a run, rows taken out and said, and a cleaned file that a run takes as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import pytest

from alignkit.data import languages, similar
from alignkit.data.candidates import to_candidate_rows
from alignkit.data.load import load_rows
from alignkit.data.report import data_report
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.supervised_schema import supervised_rows
from alignkit.errors import ConfigError, DataError
from alignkit.models.loading import load_tokenizer
from alignkit.programs import data as program
from tests.programs.conftest import pairs, save_model, write_rows

TEMPLATE = (
    "{% for m in messages %}{{ ' <unk> ' + m.content }}{% if m.role == 'assistant' %} <eos>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data_program") / "model"
    save_model(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return str(path)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    # What is said does not depend on what is installed here.
    for module, name in ((similar, "can_compare"), (languages, "can_tell_languages")):
        monkeypatch.setattr(module, name, lambda: False)


def written(name: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    write_rows(Path(name), rows)
    return list(rows)


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def as_json(*words: str) -> dict[str, Any]:
    program.main([*words, "--output", "report.json", "--overwrite"])
    content: dict[str, Any] = json.loads(Path("report.json").read_text())
    return content


FLAWED = pairs(20)
FLAWED[3] = FLAWED[3] | {"chosen": None}
FLAWED[5] = FLAWED[5] | {"rejected": FLAWED[5]["chosen"]}
FLAWED[8] = dict(FLAWED[1])
FLAWED[9] = FLAWED[2] | {"prompt": 7}
CLEAN = [row for index, row in enumerate(FLAWED) if index not in (3, 5, 9)]


@pytest.mark.parametrize("with_model", [False, True], ids=["no model", "model"])
def test_rows_that_cannot_be_trained_on_are_said_and_left_out(
    model: str, with_model: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    written("pairs.jsonl", FLAWED)
    words = ["pairs.jsonl", *(["--model", model] if with_model else []), "--write", "clean.jsonl"]
    content = as_json(*words)
    assert read("clean.jsonl") == CLEAN
    assert (content["program"], content["method"]) == ("preference", "dpo")
    train = content["splits"]["train"]
    assert (train["num_rows_in"], train["num_malformed"], train["num_rows"]) == (20, 2, 17)
    assert train["dropped"] == {"candidates are identical": 1}
    assert train["dropped_rows"] == {"candidates are identical": [5]}, "as numbered in the file"
    assert content["refused"] == ["train: 2 of 20 rows are malformed"]
    shown = capsys.readouterr().out
    for said in ("chosen is null: every row needs one", "row 3: null", "prompt is int, expected text", "row 9: 7",
                 "candidates are identical: row 5\n"):  # fmt: skip
        assert said in shown
    assert "a run refuses these rows: train: 2 of 20 rows are malformed" in shown
    assert "written: 17 of 20 rows to clean.jsonl" in shown
    assert similar.MISSING in shown and languages.MISSING in shown
    # Not a row of it is refused or dropped.
    again = as_json("clean.jsonl", *words[1:3] if with_model else [])
    assert again["refused"] == [] and again["splits"]["train"]["num_rows"] == 17


def test_the_numbers_of_pairs_are_those_of_a_run(model: str) -> None:
    rows, held_out = written("pairs.jsonl", [*pairs(30), *pairs(2)]), written("held.jsonl", pairs(6, seed=3))
    assert len(rows) == 32 and held_out
    content = as_json("pairs.jsonl", "--eval_data", "held.jsonl", "--model", model, "--max_length", "7")
    tokenizer = load_tokenizer(model)
    converted = {
        name: to_candidate_rows(
            load_rows(path), tokenizer, max_length=7, num_candidates=2, name=name, max_dropped_fraction=1.0
        )
        for name, path in (("train", "pairs.jsonl"), ("held-out", "held.jsonl"))
    }
    report = data_report(converted, tokenizer)
    theirs = json.loads(json.dumps(report.to_dict()))
    dropped = sum(theirs["splits"][0]["dropped"].values())
    assert dropped and f"train: train: {dropped} of 32 rows are dropped" in content["refused"][0]
    for splits in (theirs["splits"], content["run_report"]["splits"]):
        for split in splits:
            # What length would do depends on the share that may be dropped, which a run would have refused.
            del split["recommended_max_length"]
    for checks in (theirs["checks"], content["run_report"]["checks"]):
        for of_split in checks.values():
            of_split[:] = [check for check in of_split if check["name"] != "rows fit max_length"]
    assert content["run_report"] == theirs
    in_force = next(cut for cut in content["splits"]["train"]["max_length"] if cut["max_length"] == 7)
    assert (in_force["num_cut"], in_force["num_dropped"]) == (theirs["splits"][0]["num_truncated_rows"], dropped)


def test_the_numbers_of_conversations_are_those_of_a_run(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    talks = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}] * 2}
        for row in pairs(12)
    ]
    written("talks.jsonl", talks)
    content = as_json("talks.jsonl", "--model", model)
    tokenizer = load_tokenizer(model)
    rows = load_rows("talks.jsonl", family=supervised_rows())
    report = data_report({"train": to_supervised_rows(rows, tokenizer, max_length=1024)}, tokenizer)
    assert content["run_report"] == json.loads(json.dumps(report.to_dict())) and content["program"] == "sft"
    shown = capsys.readouterr().out
    assert report.render() in shown
    answer = talks[0]["messages"][1]["content"].strip()
    assert "24 of 24 turns of the assistant are trained" in shown and f"[[<unk> {answer} <eos>]]" in shown


ONE = {"role": "user", "content": "q"}
FORMS = {
    "pairs": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", "dpo"),
    "lists": ({"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 2, 3]}, "preference", "adpo"),
    "labels": ({"prompt": "q", "completion": "a", "label": True}, "preference", "kto"),
    "completions": ({"prompt": "q", "completion": "a"}, "sft", "sft"),
    "text": ({"text": "a"}, "sft", "sft"),
    "talks": ({"messages": [ONE, {"role": "assistant", "content": "a"}]}, "sft", "sft"),
    "prompts": ({"prompt": [ONE], "level": 4}, "online", "grpo"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_program_is_seen_by_the_rows(form: str) -> None:
    row, expected, method = FORMS[form]
    # An answer is measured against one to another prompt, so that one row alone is none.
    rows = [row, {"prompt": "r", "completion": "b", "label": False}] if form == "labels" else [row]
    written("rows.jsonl", rows)
    content = as_json("rows.jsonl")
    assert (content["program"], content["method"]) == (expected, method)
    assert content["refused"] == [] and content["splits"]["train"]["num_rows"] == len(rows)


def test_a_method_says_which_program_the_rows_are_for() -> None:
    written("rows.jsonl", [{"prompt": f"{name}?", "chosen": "a", "rejected": "b"} for name in "pq"])
    for method, where in (("ipo", "preference"), ("bradley_terry", "reward")):
        content = as_json("rows.jsonl", "--method", method)
        assert (content["program"], content["method"]) == (where, method)
    with pytest.raises(DataError, match="write method: dpo"):
        program.main(["rows.jsonl", "--method", "sft"])
    with pytest.raises(ConfigError, match="--method: kto is one of preference runs"):
        program.main(["rows.jsonl", "--method", "kto", "--program", "sft"])


def test_another_program_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    written("rows.jsonl", [{"question": "q", "chosen": "a", "rejected": "b"}])
    content = as_json("rows.jsonl", "--program", "online", "--column_map", "prompt=question")
    assert content["program"] == "online"
    with pytest.raises(DataError, match="column 'completion' is missing"):
        program.main(["rows.jsonl", "--program", "sft"])
    Path("broken.jsonl").write_text('{"prompt": "q"\n')
    with pytest.raises(DataError, match=r"^broken.jsonl(?!.*no program)[^\n]*: 1 problem\n[^\n]*broken.jsonl:1"):
        program.main(["broken.jsonl"])
    written("none.jsonl", [{"foo": 1}])
    with pytest.raises(DataError, match="the rows of no program(.|\n)*for dpo(.|\n)*for sft(.|\n)*for grpo: "):
        program.main(["none.jsonl"])


def test_repeats_and_held_out_rows_are_left_out_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    rows = written("pairs.jsonl", [*pairs(6), *pairs(2)])
    written("held.jsonl", [rows[4], *pairs(3, seed=9)])
    words = ["pairs.jsonl", "--eval_data", "held.jsonl", "--write", "clean.jsonl", "--overwrite"]
    program.main(words)
    assert read("clean.jsonl") == rows
    assert "1 of 4 (25.0%) have an answer that is trained on" in capsys.readouterr().out
    program.main([*words, "--drop", "duplicates"])
    assert read("clean.jsonl") == rows[:6]
    program.main([*words, "--drop", "duplicates", "overlap"])
    assert read("clean.jsonl") == [row for index, row in enumerate(rows[:6]) if index != 4]


def test_near_duplicates_are_said_shown_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With signatures of a fake package: texts are alike here when they begin with the same letter."""
    import numpy as np

    def signatures(texts: Any) -> Any:
        return np.array([[ord(text[0])] * similar.NUM_PERMUTATIONS for text in texts], dtype=np.uint32)

    monkeypatch.setattr(similar, "can_compare", lambda: True)
    monkeypatch.setattr(similar, "signatures_of", signatures)
    rows = [{"prompt": p, "completion": c} for p, c in (("a1", "x"), ("b", "x"), ("a2", "x"), ("b", "x"), ("c", "x"))]
    written("rows.jsonl", rows)
    content = as_json("rows.jsonl", "--write", "clean.jsonl", "--drop", "alike")
    assert content["splits"]["train"]["survey"]["num_alike"] == 1, "row 3 repeats another to the letter"
    assert read("clean.jsonl") == [rows[0], rows[1], rows[3], rows[4]]
    shown = capsys.readouterr().out
    assert "1 row is like an earlier one (20.0%)" in shown and "row 2  a2" in shown


class _Tags(HTMLParser):
    """What a page opens and closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href"}, "a page asks for nothing elsewhere"
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_holds_text_alone(model: str) -> None:
    bad = "w1 <script>alert(1)</script> & \x1b[31m <img src=x>"
    written("rows.jsonl", [{"prompt": bad, "chosen": "w2", "rejected": bad} for _ in range(3)])
    for words in ([], ["--model", model]):
        program.main(["rows.jsonl", *words, "--output", "page.html", "--overwrite"])
        page = Path("page.html").read_text()
        tags = _Tags()
        tags.feed(page)
        assert not tags.open and not tags.seen & {"script", "img", "link", "iframe"}
        assert "\x1b" not in page and "&lt;script&gt;" in page or words
        assert ("<mark>" in page) == bool(words)


def test_words_that_make_no_sense_are_refused_together(model: str) -> None:
    written("rows.jsonl", [{"text": "a"}])
    words = ["rows.jsonl", "--output", "rows.jsonl", "--drop", "alike", "overlap", "--max_length", "5"]
    with pytest.raises(ConfigError) as caught:
        program.main(words)
    text = str(caught.value)
    expected = ["must end in .html or .json", "add --write FILE.jsonl", "install the Python package datasketch"]
    expected += ["add --eval_data FILE", "--max_length says something of tokens: add --model", "is an input"]
    for said in expected:
        assert said in text
    with pytest.raises(ConfigError, match="--write: rows.jsonl is an input"):
        program.main(["rows.jsonl", "--write", "rows.jsonl", "--overwrite"])


def test_rows_none_of_which_can_be_trained_on(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    written("null.jsonl", [{"text": None, "id": 1}, {"text": " ", "id": 2}])
    content = as_json("null.jsonl", "--model", model)
    assert content["run_report"] is None and content["splits"]["train"]["num_malformed"] == 2
    written("long.jsonl", pairs(5))
    content = as_json("long.jsonl", "--model", model, "--max_length", "2")
    assert content["splits"]["train"]["dropped"] == {"prompt alone fills max_length": 5}
    assert "5 of 5 rows are dropped" in content["refused"][0]
    with pytest.raises(DataError, match="--write: no row is left"):
        program.main(["null.jsonl", "--write", "clean.jsonl"])
    assert not Path("clean.jsonl").exists()


def test_labelled_answers(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 3 == 0} for n, row in enumerate(pairs(9))
    ]
    rows[4]["completion"] = None
    written("labels.jsonl", rows)
    content = as_json("labels.jsonl", "--model", model, "--write", "clean.jsonl")
    assert content["method"] == "kto" and content["splits"]["train"]["num_malformed"] == 1
    assert content["splits"]["train"]["survey"]["labels"] == {"label 0": 5, "label 1": 3}
    assert read("clean.jsonl") == [row for index, row in enumerate(rows) if index != 4]


@pytest.mark.parametrize("with_model", [False, True], ids=["no model", "model"])
def test_pairs_are_looked_at_as_the_labelled_answers_that_they_are_read_as(
    model: str, with_model: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    written("pairs.jsonl", FLAWED)
    words = ["--method", "kto", *(["--model", model] if with_model else [])]
    content = as_json("pairs.jsonl", *words, "--write", "clean.jsonl", "--drop", "duplicates")
    train = content["splits"]["train"]
    assert (train["num_rows_in"], train["num_malformed"], train["num_rows"]) == (20, 3, 34)
    assert train["survey"]["labels"] == {"label 0": 17, "label 1": 17}
    assert content["refused"] == ["train: 3 of 20 rows are malformed"]
    shown = capsys.readouterr().out
    assert "good answer  " in shown and "bad answer  " in shown
    assert "17 pairs were read as two answers each" in shown and "32 of 40 answers to clean.jsonl" in shown
    assert read("clean.jsonl") == [
        {"prompt": row["prompt"], "completion": row[which], "label": which == "chosen"}
        for index, row in enumerate(CLEAN)
        for which in ("chosen", "rejected")
        if row not in CLEAN[:index]
    ]
    # The same run takes the file as it is.
    again = as_json("clean.jsonl", *words)
    assert again["refused"] == [] and again["splits"]["train"]["num_rows"] == 32


def test_nothing_is_promised_of_a_file_where_no_row_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    written("lists.jsonl", [{"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 2, 3]}] * 3)
    program.main(["lists.jsonl", "--method", "dpo"])
    shown = capsys.readouterr().out
    assert "3 of 3 rows are malformed" in shown and "--write" not in shown


def test_several_files_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    written("a.jsonl", pairs(3))
    written("b.jsonl", [{**row, "extra": 1} for row in pairs(2, seed=1)])
    program.main(["a.jsonl", "b.jsonl", "--write", "both.jsonl"])
    shown = capsys.readouterr().out
    assert "of a.jsonl" in shown and "of b.jsonl" in shown
    assert sorted(map(str, read("both.jsonl"))) == sorted(map(str, pairs(3) + pairs(2, seed=1)))
