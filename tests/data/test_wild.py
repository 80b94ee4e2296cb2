"""Files as they are found in the wild train, after at most one edit, which the error message dictates.

The test plays a user who does what the message says and nothing else: it takes the column map, the ending, the encoding
or the rows from the message, changes the file or the config so, and tries once more.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from alignkit.data.candidates import to_candidate_rows
from alignkit.data.columns import Form, RowFamily
from alignkit.data.load import load_rows
from alignkit.data.opened import opened
from alignkit.data.recognition import said_formats
from alignkit.data.schema import preference_rows
from alignkit.data.supervised import to_supervised_rows
from alignkit.data.supervised_schema import supervised_rows
from alignkit.data.unpaired import to_unpaired_rows
from alignkit.data.unpaired_schema import unpaired_rows
from alignkit.errors import DataError
from alignkit.parts.data_format import format_names
from alignkit.parts.method import load_method
from tests.configs.cases import problems_of
from tests.data.wild.files import FILES, Wild, lines, write
from tests.shapes.building import build, config_of
from tests.supervised import model
from tests.supervised import tokenizer as tokenizer_of_the_model

STEPS = RowFamily(
    (Form(("prompt", "completions", "labels")),), "", lambda columns, head, name: None, lambda row: row["prompt"]
)
METHODS = {"supervised": "sft", "pairs": "dpo", "lists": "lipo", "labels": "kto"}
TAKES_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
WRITES_CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"


@pytest.fixture(scope="module")
def talker() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny model, with a template that knows tools and tool messages."""
    backend = tokenizer_of_the_model().backend_tokenizer
    template = (
        f"{TAKES_TOOLS}{{% for m in messages %}}<|{{{{ m.role }}}}|>{{% if m.role == 'assistant' %}}{{% generation %}}"
        f"{{{{ m.content or '' }}}}{WRITES_CALLS}{{{{ eos_token }}}}{{% endgeneration %}}"
        "{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    own = tokenizer_of_the_model()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=own.eos_token, pad_token=own.pad_token, chat_template=template
    )


def family(wild: Wild) -> RowFamily:
    if wild.rows in ("steps", "labels", "supervised"):
        return {"steps": STEPS, "labels": unpaired_rows(), "supervised": supervised_rows()}[wild.rows]
    return preference_rows(2 if wild.rows == "pairs" else None)


def converted(wild: Wild, path: Path, config: dict[str, Any], talker: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    """The rows as loaded and, where a program of this suite trains them, as token ids."""
    rows = load_rows(str(path), family=family(wild), **config)
    if wild.rows == "steps":
        return rows, None
    if wild.rows == "labels":
        tokens, report = to_unpaired_rows(rows, talker, weights=(1.0, 1.0), seed=0, max_length=None)
    elif wild.rows == "supervised":
        tokens, report = to_supervised_rows(rows, talker, max_length=None)
    else:
        wanted = 2 if wild.rows == "pairs" else None
        tokens, report = to_candidate_rows(rows, talker, max_length=None, num_candidates=wanted)
    assert report.formats == said_formats(rows)
    return rows, tokens


def told_edit(message: str, path: Path, config: dict[str, Any]) -> tuple[str, Path]:
    """Do what a message says; returns the kind of edit, and where the file is then."""
    if found := re.search(r"Write column_map: (\{[^}]*\})", message):
        config["column_map"] = yaml.safe_load(found[1])
        return "column_map", path
    if found := re.search(r"give the file the ending (\.\w+)", message, re.IGNORECASE):
        return "ending", path.rename(path.with_suffix(found[1]))
    if "save it as utf-8" in message.lower():
        path.write_bytes(path.read_bytes().decode("cp1252").encode())
        return "encoding", path
    if found := re.search(r":(\d+): \d+ cells, and the header names (\d+) .* into quotes", message, re.IGNORECASE):
        texts = path.read_text().splitlines()
        number, width = int(found[1]) - 1, int(found[2])
        cells = next(csv.reader([texts[number]]))
        # Which of the cells is the text with a comma is for the user to see: here the first.
        texts[number] = ",".join([f'"{",".join(cells[: len(cells) - width + 1])}"', *cells[len(cells) - width + 1 :]])
        path.write_text("\n".join(texts) + "\n")
        return "quotes", path
    numbers = {int(number) for number in re.findall(r"\brow (\d+)", re.sub(r"\(the first[^)]*\)", "", message))}
    assert numbers and re.search(r"[Rr]emove (the|such) rows?", message), f"the message dictates nothing: {message}"
    with opened(str(path)) as stream:
        rows = [json.loads(line) for line in stream if line.strip()]
    path = path.with_name("kept.jsonl")
    path.write_bytes(lines([row for number, row in enumerate(rows) if number not in numbers]))
    return "rows", path


@pytest.mark.parametrize("wild", FILES, ids=lambda wild: wild.name)
def test_a_file_from_the_wild_is_read_after_the_one_edit_that_the_message_dictates(
    wild: Wild, tmp_path: Path, talker: PreTrainedTokenizerFast
) -> None:
    path, config, edit = write(wild, tmp_path), {}, None
    try:
        rows, tokens = converted(wild, path, config, talker)
    except DataError as error:
        edit, path = told_edit(str(error), path, config)
        rows, tokens = converted(wild, path, config, talker)
    assert edit == wild.edit
    assert [said.partition(" (")[0] for said in said_formats(rows)] == ([wild.format] if wild.format else [])
    assert len(rows) == wild.count
    shown = json.dumps(rows[:], ensure_ascii=False)
    if tokens is None:
        assert wild.contains in shown
        return
    assert len(tokens) == wild.count
    texts = [
        talker.decode(ids)
        for row in tokens
        for ids in ([row["input_ids"]] if wild.rows == "supervised" else [row["prompt_ids"], *row["completion_ids"]])
    ]
    assert any(wild.contains in text for text in texts), texts


@pytest.mark.parametrize("wild", FILES, ids=lambda wild: wild.name)
def test_the_check_before_anything_is_loaded_says_the_same(
    wild: Wild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be seen in the first rows is said by the check of the config, in words that lead to the same edit."""
    if wild.rows == "steps":
        return
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        Path("base", name).write_text("{}")
    method = METHODS[wild.rows]
    path, config = write(wild, Path()), {}
    if found := problems_of({"method": method, "data": str(path)}):
        edit, path = told_edit("\n".join(found), path, config)
        assert edit == wild.edit
        assert problems_of({"method": method, "data": str(path), **config}) == []
    # A malformed row may be any; the others show in the first rows.
    assert found or wild.edit in (None, "rows")


def test_there_are_twenty_files_in_twelve_formats() -> None:
    assert len(FILES) >= 20 and len({wild.name for wild in FILES}) == len(FILES)
    assert {wild.format for wild in FILES} == {*format_names(), ""}
    assert Counter(wild.edit for wild in FILES)[None] > len(FILES) / 2, "most need no edit"


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model for the tokens of ``talker``."""
    folder = tmp_path_factory.mktemp("model")
    model().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("wild", FILES, ids=lambda wild: wild.name)
def test_two_steps_train(wild: Wild, tmp_path: Path, talker: PreTrainedTokenizerFast, saved_model: str) -> None:
    """With the method that such rows are for, through the bridge of its program."""
    method = {**METHODS, "steps": "process_reward"}[wild.rows]
    keys = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 4096}
    run = config_of(load_method(method).program, saved_model, tmp_path, method=method, **keys)
    path, config = write(wild, tmp_path), {}

    def built() -> Any:
        return build(run, load_rows(str(path), family=run.row_family(vars(run)), **config), tokenizer=talker)

    try:
        trainer = built()
    except DataError as error:
        _, path = told_edit(str(error), path, config)
        trainer = built()
    before = [weights.clone() for weights in trainer.model.parameters()]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(torch.isfinite, map(torch.tensor, losses)))
    assert any(not torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))
