"""``alignkit chat``: what is asked, what is answered by whom, and the commands, as from a pipe."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.data.checks import TEMPLATE_CHECK
from alignkit.errors import ConfigError, ModelError
from alignkit.programs import chat
from alignkit.sampling.conversation import Conversation
from alignkit.sampling.generation import Sampling
from tests.scripts.tiny import byte_tokenizer, save_adapter, save_model, tiny_model

GREEDY = ("--temperature", "0", "--max_new_tokens", "6", "--use_cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("chat") / "base", seed=3)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return save_adapter(base, base.with_name("adapter"), scale=0.5)


def told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: Sequence[str], *words: str
) -> list[str]:
    """Lines that a conversation prints."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
    chat.main([*map(str, words)], "alignkit chat")
    return capsys.readouterr().out.splitlines()


def greedy(folder: Path, turns: Sequence[tuple[str, str]], adapter: Path | None = None, tokens: int = 6) -> str:
    """The likeliest answer to turns, one token after the other over the whole text, as a template would write them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "".join(f"<|user|>{asked}<|assistant|>{answer}" for asked, answer in turns)
    ids = tokenizer(text)["input_ids"]
    drawn: list[int] = []
    while len(drawn) < tokens and tokenizer.eos_token_id not in drawn:
        drawn.append(int(model(torch.tensor([ids + drawn])).logits[0, -1].argmax()))
    return tokenizer.decode(drawn, skip_special_tokens=True)


def test_base_and_tuned_answer_side_by_side_and_remember(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Against a decoding of its own: each sees its own turns, and nothing of the other's."""
    file = tmp_path / "talk.json"
    printed = "\n".join(told(monkeypatch, capsys, ["Hello", "More", f"/save {file}"], adapter, *GREEDY))
    turns = json.loads(file.read_text())["conversations"]
    for name, put_on in (("base", None), ("tuned", adapter)):
        first = greedy(base, [("Hello", "")], put_on)
        second = greedy(base, [("Hello", f"{first}<|end|>"), ("More", "")], put_on)
        contents = [(turn["role"], turn["content"]) for turn in turns[name]]
        assert contents == [("user", "Hello"), ("assistant", first), ("user", "More"), ("assistant", second)]
    assert turns["base"][1] != turns["tuned"][1]
    assert [line for line in printed.splitlines() if line.startswith("you> ")] == [
        "you> Hello",
        "you> More",
        f"you> /save {file}",
    ]
    assert printed.index("base> ") < printed.index("tuned> ")


@pytest.mark.parametrize("status", ["warn", "ok"])
def test_a_run_on_plain_text_is_said_to_be_one(
    status: str, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "run")
    check = {"name": TEMPLATE_CHECK, "status": status, "message": ""}
    record = {"alignkit_run": 1, "data": {"checks": {"train": [check]}}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    lines = told(monkeypatch, capsys, ["/quit"], tmp_path / "run", *GREEDY)
    assert (chat.AS_TEXT in lines) is (status == "warn")


def test_commands(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    typed = ["Hello", "/reset", "/alone", "a\\", "b", "/system Be brief.", "c", "/set max_new_tokens 2", "/set beta 1"]
    typed += ["/set top_p 2", f"/save {file}", f"/save {file}", "/what", "", "/quit", "never read"]
    lines = told(monkeypatch, capsys, typed, adapter, *GREEDY)
    content = json.loads(file.read_text())
    assert content["sampling"]["max_new_tokens"] == 2
    assert [turn["content"] for turn in content["conversations"]["tuned"]][:2] == ["Be brief.", "c"]
    assert content["conversations"]["base"] == [{"role": "system", "content": "Be brief."}]
    printed = "\n".join(lines)
    assert "you> a\nb" in printed and "never read" not in printed
    for expected in (
        "! /set takes one of temperature, top_p, max_new_tokens, seed",
        "! /set top_p: expected a share, above 0 and up to 1, got '2'",
        f"! {file} exists, and is not written over",
        "/reset            forget all turns",
    ):
        assert expected in printed


def test_a_model_without_template_continues_text(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tiny_model(seed=3).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    lines = told(monkeypatch, capsys, ["One", "One", "/system Be brief."], tmp_path / "plain", *GREEDY)
    assert lines[0].startswith("the tokenizer has no chat template: every text is continued by itself")
    answers = "\n".join(lines[1:]).split("you> ")[1:]
    assert answers[0] == answers[1] and answers[0].startswith("One\nmodel> ")
    assert "! a system message needs a chat template" in answers[2]


def test_a_full_model_beside_another(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = save_model(tmp_path / "tuned", seed=5)
    printed = "\n".join(told(monkeypatch, capsys, ["Hello"], other, "--compare", base, *GREEDY))
    assert f"base> {greedy(base, [('Hello', '')])}" in printed and f"tuned> {greedy(other, [('Hello', '')])}" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "the model 'nowhere/at/all' does not exist"),
        (["{base}", "--model", "{base}"], "is not a saved adapter"),
        (["{reward}"], "is a reward model, which gives scores and no answers"),
        (["{adapter}", "--compare", "{base}"], "the base of an adapter answers beside it as it is"),
        (["{base}", "--compare", "{base}", "--alone"], "--compare asks for a model that would not answer"),
        (["{base}", "--chat_template", "none.jinja"], "there is no file none.jinja"),
        (["{base}", "--temprature", "1"], "unknown option --temprature; did you mean --temperature?"),
    ],
)
def test_what_cannot_work(words: list[str], message: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["Qwen3ForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        chat.main([word.format(base=base, adapter=adapter, reward=tmp_path) for word in words], "alignkit chat")


def test_answers_come_piece_by_piece_and_differ_with_the_seed(base: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    answers = []
    for seed in (0, 0, 1):
        pieces: list[str] = []
        speaker = Conversation(model, tokenizer, Sampling(max_new_tokens=24, temperature=1.0, seed=seed))
        answers.append(speaker.answer("Hello", pieces.append))
        assert "".join(pieces) == answers[-1]
    assert answers[0] == answers[1] != answers[2]


def test_turns_that_are_longer_than_the_model_reads(base: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    speaker = Conversation(model, tokenizer, Sampling(max_new_tokens=100))
    speaker.answer("x" * 500)  # 10 positions are left
    with pytest.raises(ModelError, match="the model reads 512. Begin anew"):
        speaker.answer("y" * 100)
    assert len(speaker.messages) == 2
