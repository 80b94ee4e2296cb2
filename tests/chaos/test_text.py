"""Secrets that somebody wrote down do not come back, and texts of rows and names of files are nothing but text."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO, cast

import pytest
import yaml
from huggingface_hub import metadata_load

from alignkit import cli
from alignkit.config import load_config
from alignkit.errors import AlignkitError, ConfigError, DataError
from alignkit.plain_text import ShownText, all_without_secrets, visible, without_secrets
from alignkit.programs.entry import run_program
from alignkit.references.token_reward_report import write_heatmap
from alignkit.reports.card import content_of_run, render_card
from alignkit.runs.directory import RunDirectory
from tests.reports.test_card import SECTIONS, config

CANARY = "CaNaRy0123456789abcdefGHIJ"
WRITTEN = (
    f"hf_{CANARY}",
    f"https://ada:{CANARY}@example.org/rows.jsonl",
    f"https://{CANARY}@example.org/rows.jsonl",
    f"https://example.org/rows.jsonl?token={CANARY}",
    f"https://example.org/rows.jsonl?x=1&access_token={CANARY}&y=2",
    f"https://example.org/rows.jsonl?X-Amz-Signature={CANARY}",
    f"s3://key:{CANARY}@bucket/rows.jsonl",
    f"Authorization: Bearer {CANARY}",
    f"ghp_{CANARY}",
    f"sk-{CANARY}",
    f"--hub_token={CANARY}",
)
"""Ways to write a secret into a value."""

HOSTILE = (
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[31mred",
    "\x9b31m",
    "over\rwritten",
    "back\x08\x08space",
    "nul\x00",
    "\u202egnirts",
    "half \ud800 pair",
    "two\u2028lines",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[here](javascript:alert(1))",
    "![](https://spy/x.png)",
    "`` ` ``code`",
    "```\n# heading\n```",
    "a\n---\nlicense: evil\n---\n# heading",
    "---\nlicense: evil\n---",
    "|x|y|\n|-|-|",
    "{{ 7*7 }}",
    "%s %n",
    "'\"><b>",
    "*_~# plain",
    "<!-- ",
    "&lt;b&gt; &#60;b&#62;",
)
"""Texts that would do something where they are taken for more than text."""
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\ud800-\udfff]")
"""What a terminal must not get; a page neither."""


@pytest.mark.parametrize("given", WRITTEN)
def test_a_secret_is_in_no_record_of_a_run(given: str, tmp_path: Path) -> None:
    values = {**SECTIONS, "config": config(data=given, model=given)}
    run = RunDirectory.create(tmp_path / "run")
    run.record(**values, status=f"failed: ValueError: cannot read {given}", origin={"places": [given, {"deep": given}]})
    assert CANARY not in (tmp_path / "run" / "run.json").read_text()
    # The config that wrote it resumes it: what is compared is hidden on both sides.
    run.check_resumable(values["config"])
    assert CANARY not in render_card(content_of_run(run.sections(), "name/my-model"))


def test_a_key_that_names_a_secret_hides_any_value() -> None:
    given = {"hub_token": "short", "password": "x", "a": {"api_key": "y"}, "eos_token": "</s>", "beta": 0.1}
    expected = {"hub_token": "***", "password": "***", "a": {"api_key": "***"}, "eos_token": "</s>", "beta": 0.1}
    assert all_without_secrets(given) == expected


@pytest.mark.parametrize(
    "text",
    [
        "eos_token: <|im_end|>",
        "the token: 5 of 7",
        "hf_hub_download",
        "`hf auth login`, or set HF_TOKEN",
        "10 tokens",
        "export HF_TOKEN=...",
        "me@example.org",
        "https://huggingface.co/org/name",
        "password protected",
        "git@host:a/b",
        "chosen_token_rewards=0.5",
        "bearer of news",
        "sk-learn",
        "C:/a",
        "hf_Transfer is a package",
    ],
)
def test_what_is_no_secret_is_not_hidden(text: str) -> None:
    assert without_secrets(text) == text


def test_no_message_repeats_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way into a configuration: a key of ours, a key that is none, a list, an option, a file that is no YAML."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    tried = 0
    for given in (*WRITTEN, CANARY):
        files: list[Any] = [{"hub_token": given}, {"token": given}, {"hub_token": [given]}]
        if given != CANARY:
            files += [{key: given} for key in ("data", "model", "adapter", "seed", "method", "column_map")]
            files += [{"data": [{"path": given, "weigth": 1}]}, {given: 1}, [given]]
        for number, content in enumerate(files):
            path = tmp_path / f"{number}.yaml"
            path.write_text(yaml.safe_dump({"data": str(rows)} | content if isinstance(content, dict) else content))
            with pytest.raises(ConfigError) as raised:
                load_config("preference", path)
            assert CANARY not in str(raised.value) + repr(raised.value), content
            tried += 1
        for words in (["--hub_token", given], [f"--hub_token={given}"], ["--token", given]):
            sys.argv = ["alignkit", "train", "preference/flex_dpo", *words]
            with pytest.raises(SystemExit) as ended:
                run_program(lambda: cli.run(sys.argv[1:]))
            printed = "".join(capsys.readouterr())
            assert ended.value.code == 2 and CANARY not in printed, (words, printed)
            assert "HF_TOKEN" in printed and "is not a key" in printed
            tried += 1
    print(f"messages about a secret that do not repeat it: {tried} of {tried}")


def test_output_logs_and_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "unusual-form-of-a-token")
    raw = io.StringIO()
    stream = cast(TextIO, ShownText(raw, redrawn=False))
    handler = logging.StreamHandler(stream)
    for given in (*WRITTEN, "unusual-form-of-a-token"):
        print(given, [given], file=stream)
        handler.emit(logging.LogRecord("x", logging.WARNING, "f.py", 1, "cannot open %s", (given,), None))
        try:
            raise ValueError(f"no such file: {given}")
        except ValueError:
            traceback.print_exc(file=stream)
    assert CANARY not in raw.getvalue() and "unusual-form" not in raw.getvalue()
    assert raw.getvalue().count("***") >= 4 * len(WRITTEN)


def test_no_control_character_reaches_a_terminal() -> None:
    for redrawn in (False, True):
        raw = io.StringIO()
        stream = cast(TextIO, ShownText(raw, redrawn=redrawn))
        for text in HOSTILE:
            print("row:", text, file=stream)
        shown = raw.getvalue()
        assert not RAW.search(shown.replace("\r", "") if redrawn else shown)
        shown.encode()
        assert r"\x1b]0;owned\x07" in shown and r"\x9b31m" in shown and r"\u202e" in shown and "{{ 7*7 }}" in shown
        assert (r"over\rwritten" in shown) is not redrawn
    # What progress bars draw stays, on the stream they are drawn on.
    raw = io.StringIO()
    ShownText(raw, redrawn=True).write("\rstep 3\n\x1b[A\tdone é 漢")
    assert raw.getvalue() == "\rstep 3\n\x1b[A\tdone é 漢"


def test_errors_show_what_they_quote() -> None:
    for text in HOSTILE:
        for error in (AlignkitError(f"row {text}"), DataError(text, [text])):
            assert not RAW.search(str(error))


def heading_texts(page: str) -> list[str]:
    """Titles of a page as a reader sees them, after a look that nothing in it is a tag, a picture or a script."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(page)
    for token in tokens:
        parts = [token, *(token.children or [])]
        for part in parts:
            if part.type in ("html_inline", "html_block"):
                assert re.fullmatch(r"<details><summary>[\w ]+</summary>\s*|</details>\s*", part.content), part.content
            target = str(part.attrs.get("href", part.attrs.get("src", "https://")))
            assert re.match(
                r"https://(huggingface\.co|arxiv\.org|openreview\.net|aclanthology\.org)|plot\.png|https://$", target
            )
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def test_names_and_texts_in_a_card_are_text(tmp_path: Path) -> None:
    plain = render_card(content_of_run({**SECTIONS, "config": config(data="rows.jsonl")}, "name/my-model"))
    titles = heading_texts(plain.partition("\n---\n")[2])
    tried = 0
    for text in HOSTILE:
        verdict = {"name": text, "step": 1, "title": text, "evidence": text}
        changed = config(data=[f"{text}.jsonl", {"path": text}], model=f"./{text}", note=text)
        changed["note"]["source"] = f"{text}.yaml:3"
        sections = {**SECTIONS, "config": changed, "health": [verdict]}
        for location in ("name/my-model", f"runs/{text}"):
            card = render_card(content_of_run(sections, location))
            (tmp_path / "README.md").write_text(card)
            found = metadata_load(tmp_path / "README.md")
            assert "license" not in found and set(found) <= {"library_name", "pipeline_tag", "tags"}
            assert not RAW.search(card)
            body = card.partition("\n---\n")[2]
            assert heading_texts(body)[1:] == titles[1:], text
            tried += 1
    print(f"cards in which a hostile text is text: {tried} of {tried}")


def test_texts_in_a_heat_map_are_text(tmp_path: Path) -> None:
    class Letters:
        """A tokenizer whose token ids are characters."""

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    for number, text in enumerate(HOSTILE):
        ids = [ord(character) for character in text]
        row = {
            "prompt_ids": ids,
            "completion_ids": [ids, ids],
            "scores": [1.0, 0.0],
            "token_rewards": [[0.1] * len(ids), [-0.1] * len(ids)],
        }
        page = tmp_path / f"{number}.html"
        write_heatmap(page, [row], cast(Any, Letters()))
        found = page.read_text()
        tags = set(re.findall(r"<\s*/?\s*(\w+)", found.partition("<body>")[2]))
        assert tags <= {"h1", "h2", "h3", "p", "span", "pre", "div", "body", "html"}, tags
        assert not RAW.search(found)
        assert "<!--" not in found and json.dumps(visible(text))[1:-1].count("<script") == 0 or "<script" not in found
