from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from alignkit.config.data_peek import peek
from alignkit.data.prompts_schema import prompt_rows
from alignkit.errors import DataError
from alignkit.shapes.tokens import SupervisedConfig
from tests.configs.cases import ROWS, load, load_text, problems_of

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
LIST = {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 0.5, 0]}
EXPECTED = (
    "Expected prompt, chosen, rejected; or chosen, rejected with a shared beginning; or prompt, completions, scores."
)


def as_file(content: str | bytes | list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Write a data file and return the change that names it."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {"data": name}


ACCEPTED = {
    "pairs": ([PAIR], "a.jsonl"),
    "implicit prompt": ([{"chosen": "ab", "rejected": "ac"}], "a.jsonl"),
    "candidate lists": ([LIST], "a.jsonl"),
    "json array": (json.dumps([PAIR, PAIR], indent=1), "a.json"),
    "json lines packed by gzip": (gzip.compress(json.dumps(PAIR).encode()), "a.jsonl.gz"),
    "a csv cell of any length": (f"prompt,chosen,rejected\n{'y' * 200_000},b,c\n", "a.csv"),
    "json lines called json": ([PAIR], "a.json"),
    "a column that is absent from the first row": ([{"chosen": "a", "prompt": "x"}, PAIR], "a.jsonl"),
    "array longer than one chunk": (json.dumps([PAIR | {"chosen": "x" * 200_000}] * 3), "a.json"),
    "blank lines": ("\n\n" + json.dumps(PAIR) + "\n\n", "a.jsonl"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(PAIR).encode(), "a.jsonl"),
    "csv": ("prompt,chosen,rejected\na,b,c\n", "a.csv"),
    "csv of lists": ('prompt,completions,scores\na,"[""b"", ""c""]","[1, 0]"\n', "a.csv"),
    "a folder below": ([PAIR], "folder/deeper/a.jsonl"),
}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("content", "name"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted(content: Any, name: str) -> None:
    change = as_file(content, name)
    assert problems_of(change) == []
    if "/" in name:
        assert problems_of({"data": name.partition("/")[0]}) == []


REFUSED: dict[str, tuple[Any, str, str]] = {
    "empty file": (b"", "a.jsonl", "a.jsonl is empty"),
    "blank file": ("\n \n", "a.jsonl", "a.jsonl holds no row"),
    "empty array": ("[]", "a.json", "a.json holds no row"),
    "malformed line": (json.dumps(PAIR) + '\n{"prompt": "x",\n', "a.jsonl", "a.jsonl:2 is malformed JSON: "),
    "malformed array": ('[\n{"prompt": 1},\n{"chosen": }]', "a.json", "a.json:3 is malformed JSON: "),
    "open array": ('[{"prompt": 1}', "a.json", "a.json:1 is malformed JSON: "),
    "array of text": ('["a"]', "a.json", "a.json holds str, not an object with named columns"),
    "line of text": ('"a"\n', "a.jsonl", "a.jsonl:1 holds str, not an object with named columns"),
    "not text": (b"\xff\xfe\x08\x00", "a.jsonl", "a.jsonl is not UTF-8 text"),
    "half a gzip archive": (b"\x1f\x8b\x08\x00", "a.jsonl", "a.jsonl is a broken gzip archive"),
    "csv without rows": ("prompt,chosen,rejected\n", "a.csv", "a.csv holds no row"),
    "csv with a column twice": ("prompt,chosen,chosen\na,b,c\n", "a.csv", "a.csv:1: several columns are called chosen"),
    "not parquet": (b"PAR2", "a.parquet", "a.parquet is not a parquet file"),
    "a table called json": ("prompt,chosen,rejected\na,b,c\n", "a.jsonl", "a.jsonl:1 is malformed JSON"),
    "half a zstd archive": (b"\x28\xb5\x2f\xfd\x04", "a.jsonl", "a.jsonl is a broken zstd archive"),
    "a cell too many": ("prompt,chosen,rejected\na,b,c,d\n", "a.csv", "a.csv:2: 4 cells, and the header names 3"),
    "other ending": ([PAIR], "a.txt", "names a.txt, whose ending is not one of .jsonl, .json, .parquet, .csv"),
    "missing column": ([{"chosen": "a", "prompt": "b"}], "a.jsonl", "column 'rejected' is missing"),
    "misnamed column": (
        [{"prompt": "a", "chosen": "b", "reject": "c"}],
        "a.jsonl",
        "Write column_map: {rejected: reject}",
    ),
    "columns named": ([{"a": 1, "b": 2}], "a.jsonl", "Columns present: 'a', 'b'. " + EXPECTED),
    "two forms in one row": (
        [{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": []}],
        "a.jsonl",
        "the prompt is text, completions are messages",
    ),
}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("content", "name", "expected"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("key", ["data", "eval_data"])
def test_refused(content: Any, name: str, expected: str, key: str) -> None:
    found = problems_of({key: as_file(content, name)["data"]})
    assert found and all(problem.startswith(f"command line: `{key}: {name}` ") for problem in found)
    assert expected in found[0]


PLACES = {
    "misspelt file": ("row.jsonl", "names row.jsonl, which does not exist. Did you mean rows.jsonl?"),
    "no such folder": (
        "gone/rows.jsonl",
        "names gone/rows.jsonl, which does not exist. The folder gone does not exist",
    ),
    "absolute": ("/gone/rows", "names /gone/rows, which does not exist"),
    "relative": ("./rows", "names ./rows, which does not exist"),
    "too deep for a Hub id": ("a/b/c", "names a/b/c, which does not exist"),
    "misspelt entry of a folder": ("base/config.jso", "Did you mean base/config.json?"),
    "folder without data": ("nothing", "names nothing, a folder without data files"),
    "no name": (" ", "is empty"),
}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("path", "expected"), PLACES.values(), ids=PLACES.keys())
def test_place_without_data(path: str, expected: str) -> None:
    Path("nothing").mkdir()
    found = problems_of({"data": path})
    assert len(found) == 1 and expected in found[0]


@pytest.mark.usefixtures("workspace")
def test_hub_ids_are_left_to_the_loader() -> None:
    assert problems_of({"data": ["org/rows", "rows"], "eval_data": {"path": "org/rows", "split": "test[:5%]"}}) == []


MIXTURES = {
    "no source": ([], "names no source"),
    "no path": ([{"weight": 1}], "has no path in data[0]. Write {path: ...}."),
    "unknown key": ([{"path": "rows.jsonl", "wieght": 1}], "has an unknown key wieght in data[0]. Write weight."),
    "text for a weight": ([{"path": "rows.jsonl", "weight": "much"}], "(data[0].weight is much)"),
    "weight of nothing": ([{"path": "rows.jsonl", "weight": 0}, "org/x"], "has a weight that is not above 0"),
    "some weights": ([{"path": "rows.jsonl", "weight": 1}, "org/x"], "weighs some sources and not others"),
    "weight of the only source": ([{"path": "rows.jsonl", "weight": 1}], "which would be ignored"),
    "number for a source": ([3], "must be text or a mapping with keys path, weight, split, config (data[0] is 3)"),
    "number": (3, "must be text or a mapping with keys path"),
}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("sources", "expected"), MIXTURES.values(), ids=MIXTURES.keys())
def test_bad_mixture(sources: Any, expected: str) -> None:
    Path("c.yaml").write_text("")
    text = f"model: base\nmethod: dpo\noutput_dir: x\ndata: {json.dumps(sources)}\n"
    with pytest.raises(Exception, match="1 problem") as caught:
        load_text(text)
    assert expected in str(caught.value) and "c.yaml:4: `data: " in str(caught.value)


@pytest.mark.usefixtures("workspace")
def test_every_source_of_a_mixture_is_looked_at() -> None:
    as_file([{"a": 1}], "other.jsonl")
    found = problems_of({"data": ["rows.jsonl", "gone.jsonl", "other.jsonl"]})
    assert ["gone.jsonl" in found[0], "(other.jsonl): column" in found[1]] == [True, True]


@pytest.mark.usefixtures("workspace")
def test_column_map_renames_before_the_columns_are_judged() -> None:
    change = as_file([{"question": "a", "good": "b", "bad": "c", "chosen": "old"}], "a.jsonl")
    assert problems_of({**change, "column_map": {"prompt": "question", "chosen": "good", "rejected": "bad"}}) == []
    swapped = as_file([{"prompt": "a", "rejected": "b", "chosen": "c"}], "b.jsonl")
    assert problems_of({**swapped, "column_map": {"chosen": "rejected", "rejected": "chosen"}}) == []


COLUMN_MAPS = {
    "column that is not there": (
        {"prompt": "promt"},
        "takes prompt from promt, which rows.jsonl does not have (columns found: prompt, chosen, rejected). "
        "Write {prompt: prompt}.",
    ),
    "turned round": ({"question": "prompt"}, "which is not a column of ours. Ours are "),
    "one column for two": ({"chosen": "prompt", "prompt": "prompt"}, "takes chosen and prompt from the same column"),
    "takes the prompt away": ({"chosen": "rejected"}, "column 'rejected' is missing"),
}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("column_map", "expected"), COLUMN_MAPS.values(), ids=COLUMN_MAPS.keys())
def test_bad_column_map(column_map: dict[str, str], expected: str) -> None:
    found = problems_of({"column_map": column_map})
    assert expected in found[0]


@pytest.mark.usefixtures("workspace")
def test_parquet() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
    chat = [{"question": "hi", "chosen": messages, "rejected": [*messages[:1], {"role": "assistant", "content": "b"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), "good.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(chat), "chat.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}]), "bad.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS).slice(0, 0), "none.parquet")
    assert problems_of({"data": "good.parquet"}) == problems_of({"data": "chat.parquet"}) == []
    assert "column 'chosen' is missing" in problems_of({"data": "bad.parquet"})[0]
    assert "none.parquet holds no row" in problems_of({"data": "none.parquet"})[0]


@pytest.mark.usefixtures("workspace")
def test_only_the_beginning_of_a_large_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    good = json.dumps(PAIR)
    Path("large.jsonl").write_text("\n".join([good] * 100 + ["{"]))
    Path("large.json").write_text("[" + ",".join([good] * 5000 + ["{"]) + "]")
    assert len(peek(Path("large.jsonl")).rows) == len(peek(Path("large.json")).rows) == 16


@pytest.mark.usefixtures("workspace")
def test_folder_written_by_save_to_disk() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk("saved")
    datasets.DatasetDict(train=table, other=table).save_to_disk("splits")
    table.remove_columns("rejected").save_to_disk("lacking")
    assert load({"data": "saved"}).config.data == "saved"
    assert problems_of({"data": {"path": "splits", "split": "other"}}) == []
    assert "column 'rejected' is missing" in problems_of({"data": "lacking"})[0]
    assert (
        "has no split test. Write one of its splits: other, train."
        in problems_of({"data": "splits", "data_split": "test"})[0]
    )
    shutil.copytree("saved", "broken")
    Path("broken/state.json").write_text("{")
    assert (
        "broken is a saved data set that cannot be read. Save it again with save_to_disk"
        in problems_of({"data": "broken"})[0]
    )


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("content", "name"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_the_loader_takes_what_is_accepted_here(content: Any, name: str) -> None:
    from alignkit.data.load import load_rows

    assert len(load_rows(as_file(content, name)["data"])) > 0


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("content", "name"), [case[:2] for case in REFUSED.values()], ids=REFUSED.keys())
def test_the_loader_refuses_what_is_refused_here(content: Any, name: str) -> None:
    from alignkit.data.load import load_rows

    with pytest.raises(DataError):
        load_rows(as_file(content, name)["data"])


@pytest.mark.usefixtures("workspace")
def test_rows_without_samples_are_enough_for_a_method_of_negatives() -> None:
    negatives = as_file([{"prompt": "a", "rejected": "c"}], "a.jsonl")
    load({"method": "d2o"} | negatives)
    assert "column 'chosen' is missing" in problems_of({"method": "dpo"} | negatives)[0]
    without_prompt = as_file([{"chosen": "ab", "rejected": "ac"}], "b.jsonl")
    assert any("prompt" in problem for problem in problems_of({"method": "d2o"} | without_prompt))


ONLINE = {
    "a prompt and what the rewards need": ([{"prompt": "2+2=", "answer": 4}], {}, []),
    "under other names": (
        [{"question": "2+2=", "solution": 4}],
        {"column_map": {"prompt": "question", "answer": "solution"}},
        [],
    ),
    "gsm8k": ([{"question": "a", "answer": "b"}], {}, []),
    "a prompt of another name": ([{"topic": "a", "answer": "b"}], {}, ["column 'prompt' is missing"]),
    "a column of the rewards": (
        [{"prompt": "a", "solution": "b"}],
        {},
        ["column 'answer' is missing, which the rewards need. Did you mean 'solution'? Write column_map: {answer:"],
    ),
    "a name that is taken": (
        [{"prompt": "a", "answer": "b", "completions": ["c"]}],
        {},
        ["column 'completions': reward functions are given something else under that name"],
    ),
    "a plain prompt beside messages": (
        [{"prompt": "a", "answer": "b", "messages": [{"role": "user", "content": "c"}]}],
        {"apply_chat_template": True},
        [],
    ),
    "messages that are messages already": (
        [{"prompt": [{"role": "user", "content": "c"}], "answer": "b"}],
        {"apply_chat_template": True},
        ["the rows are messages, to which the chat template is applied in any case"],
    ),
    "a column that is not there": (
        [{"prompt": "a", "answer": "b"}],
        {"column_map": {"topic": "subject"}},
        ["takes topic from subject, which a.jsonl does not have"],
    ),
}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("rows", "changes", "says"), ONLINE.values(), ids=ONLINE.keys())
def test_prompts_are_looked_at_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], changes: dict[str, Any], says: list[str]
) -> None:
    monkeypatch.setattr(SupervisedConfig, "row_family", staticmethod(lambda values: prompt_rows(["answer"])))
    found = problems_of({"method": "sft"} | as_file(rows, "a.jsonl") | changes)
    assert len(found) == len(says), found
    assert all(part in problem for part, problem in zip(says, found, strict=True)), found


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("row", "method", "says"),
    [
        (
            {"instruction": "a", "input": "", "output": "b"},
            "dpo",
            "written as alpaca (instruction, input, output), which method sft takes",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "dpo",
            "written as sharegpt (conversations), which method sft takes",
        ),
        (
            {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
            "sft",
            "written as nectar (prompt, answers, answer, rank), which a preference method that takes lists",
        ),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "sft", "such as dpo"),
        (
            {"query": "q", "response": "a", "thumbs": "up"},
            "sft",
            "written as kto (query, response, thumbs), which method kto",
        ),
    ],
)
def test_rows_of_another_program_are_sent_there(row: dict[str, Any], method: str, says: str) -> None:
    found = problems_of({"method": method, **as_file([row], "a.jsonl")})
    assert found and all(says in problem for problem in found)
