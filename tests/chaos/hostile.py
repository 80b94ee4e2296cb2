"""Files that somebody hostile could hand on: chat templates, configs, rows. ``hostile_models.py`` has the folders.

Each case makes its files in a workplace and gives the words that put them before a real program. ``test_hostile.py``
runs them. What code in a file would do is make a folder called ``sprung``.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from tests.programs.launching import PREFERENCE

SPRUNG = "sprung"
CODE = f"import os; os.mkdir({SPRUNG!r})"
KINDS = {
    "template": "chat templates",
    "config": "configs in YAML",
    "rows": "rows: JSON Lines and arrays, packed ones, CSV, parquet, folders",
    "adapter": "adapters",
    "model": "models, their tokenizers and generation configs",
    "card": "cards of adapters, names that get into cards",
}
"""Kinds of hostile things, and what they are in words."""
GIVEN = ("--config", "c.yaml")
"""A config that works in the workplace."""


class Trap:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, (CODE,)


PICKLE = pickle.dumps(Trap())


@dataclass(frozen=True)
class Hostile:
    """One hostile thing.

    Attributes:
        kind: What it is.
        name: What is hostile about it.
        make: Writes it into a workplace.
        says: Regular expression that the one message matches; None where it has to work, as nothing but its look is
            hostile.
        words: Command line that puts it before the program.
        program: The program.
        is_slow: It takes seconds by its nature, such as those after which something is cut short.
    """

    kind: str
    name: str
    make: Callable[[Path], object]
    says: str | None
    words: Sequence[str] = GIVEN
    program: Path = PREFERENCE
    is_slow: bool = False


def written(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Writes one file."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda place: (place / name).write_bytes(data)


ENDLESS = r"the chat template of 't\.jinja' takes longer than \d+ s"
LARGE = r"the chat template of 't\.jinja' (needs more than 1 GiB|takes longer)"
GLOBALS = "{{ %s.__globals__['__builtins__']['exec'](\"" + CODE + '") }}'
TEMPLATES: Mapping[str, tuple[str | bytes, str | None]] = {
    "a loop in a loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
        ENDLESS,
    ),
    "a power": ("{{ 10 ** (10 ** 9) }}", LARGE),
    "a repetition": ("{{ 'a' * 10 ** 11 }}", LARGE),
    "a repeated list": ("{{ [1] * 10 ** 11 }}", LARGE),
    "a doubling": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}x",
        LARGE,
    ),
    "a padding": ("{{ 'x'.center(10 ** 11) }}", LARGE),
    "a width": ("{{ '%099999999999d' % 1 }}", LARGE),
    "a repetition before an answer": ("{% if add_generation_prompt %}{{ 'a' * 10 ** 11 }}{% endif %}x", LARGE),
    "a long range": ("{% for i in range(10 ** 9) %}x{% endfor %}", "cannot render a message: Range too big"),
    "a macro that calls itself": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "cannot render a message: maximum recursion depth",
    ),
    "nested too deeply": (
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "cannot render a message: (maximum recursion depth|too many)",
    ),
    "many blocks": (
        "{% if 1 %}" * 2000 + "x" + "{% endif %}" * 2000,
        "cannot render a message: (maximum recursion depth|too many)",
    ),
    "a long text": ("{{ 'w1 ' * 10 ** 6 }}", "writes 3,000,000 characters with two short messages"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute .* is unsafe"),
    "globals of a function": (GLOBALS % "raise_exception", "access to attribute .* is unsafe"),
    "globals of a class": (GLOBALS % "cycler.__init__", "access to attribute .* is unsafe"),
    "a format string": (
        "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
        "access to attribute .* is unsafe",
    ),
    "a filter of attributes": ("{{ messages | map(attribute='__class__') | list }}", "candidates are identical"),
    "a change of the messages": ("{{ messages.append(messages) }}{{ messages }}", "access to attribute .* is unsafe"),
    "a file read": ("{% include '/etc/hostname' %}", "no loader"),
    "a module": ("{% import 'os' as os %}{{ os.mkdir('" + SPRUNG + "') }}", "no loader"),
    "a parent": ("{% extends '../secret.txt' %}", "no loader"),
    "no end": ("{% for m in messages %}", "Unexpected end of template"),
    "an unknown filter": ("{{ messages | shell }}", "No filter named 'shell'"),
    "an unknown name": ("{{ os.system('ls') }}", "'os' is undefined"),
    "bytes": (b"\xff\xfe{{ messages }}", "cannot be read: .* Write a jinja file in UTF-8"),
    "NUL": ("\x00", "candidates are identical"),
    "terminal codes": (
        "{{ raise_exception('\x1b]0;owned\x07') }}",
        r"cannot render a message: \\x1b\]0;owned\\x07",
    ),
    "nothing": ("", "candidates are identical"),
}
"""Chat templates; rows of conversations are rendered with them."""


def bomb(levels: int, width: int, leaf: str = "[x]") -> str:
    """Aliases of aliases: few lines that stand for width ** levels values."""
    lines = [f"a0: &a0 {leaf}"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


MERGES = "a0: &a0 {x: y}\n" + "\n".join(f"a{n}: &a{n}\n  !!merge <<: [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))
DOCUMENTS: dict[str, tuple[str | bytes, str]] = {
    "a bomb of aliases": (bomb(12, 10), "values, more than"),
    "a bomb of mappings": (bomb(40, 2, "{x: y}"), "values, more than"),
    "a bomb of merges": (MERGES, "values, more than"),
    "a document that contains itself": ("data: &a [*a]", "has no end"),
    "a mapping that contains itself": ("data: &a {b: *a}", "has no end"),
    "a key that contains itself": ("? &a [*a]\n: 1", "has no end"),
    "a deep nest": (f"data: {'[' * 20_000}{']' * 20_000}", "nested too deeply"),
    "a deep nest of mappings": ("{a: " * 20_000 + "}" * 20_000, "nested too deeply"),
    "a deep nest of lists": ("data:\n" + "".join(" " * n + "-\n" for n in range(1, 700)), "nested too deeply"),
    "a number of many digits": (f"max_steps: {'9' * 5000}", "5,000 digits"),
    "a large file": (f"data: '{'x' * 300_000}'", "which is no configuration"),
    "many values": (f"data: [{'x,' * 25_000}]", "values, more than"),
    "an object": (f"data: !!python/object/apply:os.mkdir ['{SPRUNG}']", "could not determine a constructor"),
    "a new object": (f"data: !!python/object/new:os.mkdir ['{SPRUNG}']", "could not determine a constructor"),
    "a module": ("data: !!python/module:os ''", "could not determine a constructor"),
    "a set": ("data: !!set {a, b}", "could not determine a constructor"),
    "binary": ("data: !!binary aGVsbG8=", "could not determine a constructor"),
    "a wrong binary": ("data: !!binary x", "could not determine a constructor"),
    "a time": ("data: !!timestamp 2024-13-45", "could not determine a constructor"),
    "a number that is none": ("max_steps: !!float many", "'many' cannot be read as float"),
    "a truth that is none": ("use_cpu: !!bool maybe", "'maybe' cannot be read as bool"),
    "pairs that are none": ("data: !!omap [1]", "could not determine a constructor"),
    "a mapping that is text": ("column_map: !!map x", "expected a mapping node"),
    "a version to come": ("%YAML 9.9\n---\ndata: x", "incompatible YAML document"),
    "an alias of nothing": ("data: *a", "undefined alias"),
    "UTF-16": ("data: x".encode("utf-16"), "not UTF-8"),
    "bytes": ("data: \x00", "not valid YAML"),
    "half a pair as bytes": (b"data: \xed\xa0\x80", "not UTF-8"),
}
"""Files that are no config: the whole of the file."""
VALUES: dict[str, tuple[str | bytes, str]] = {
    "a bomb in a key": ("? &a [&b [x, x], *b, *b]\n: 1\n", "is not a known key"),
    "a number beyond any": ("learning_rate: 1e999999999", "not a finite number"),
    "a large text": (f"model: '{'x' * 200_000}'", r"x \.\.\. x"),
    "a large key": (f"{'x' * 1000}: 1", "is not a known key"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(9000)), "and 8,9.. more"),
    "a list as a key": ("? [a, b]\n: 1", "is not a known key"),
    "a mapping as a key": ("{{a: b}: 1}", "is not a known key"),
    "half a pair": (b'data: "\\ud800"', r"names \\ud800, which does not exist"),
    "terminal codes": ('"\\e]0;owned\\a\\e[2J": "\\e[31m"', r"\\x1b\]0;owned\\x07.* is not a known key"),
    "a text from right to left": ("\u202edata: x", r"`\\u202edata: x` is not a known key"),
    "a name with NUL": ('model: "a\\0b"', "is a path that does not exist"),
    "an output with NUL": (
        'model: model\ndata: rows.jsonl\nmethod: dpo\noutput_dir: "a\\0b"',
        "output_dir: .* holds a NUL character",
    ),
    "rows with NUL": ('data: "a\\0b.jsonl"', r"names a\\x00b\.jsonl, which does not exist"),
    "a name too long": (f"data: {'x' * 5000}.jsonl\noutput_dir: {'x' * 5000}", r"x \.\.\. x"),
}
"""Configs that can be read and hold what cannot be used: the whole of the file."""

PAIR = {"prompt": "w1 w2 ", "chosen": "w3 ", "rejected": "w4 "}
LINE = json.dumps(PAIR)


def long_number(digits: int) -> str:
    return LINE.replace('"w1 w2 "', "9" * digits)


PART = 2**24


def packed(size: int, content: bytes = b" ", head: bytes = b"") -> bytes:
    """A gzip archive of one letter repeated to ``size`` bytes behind a beginning: an archive may have many parts."""
    return gzip.compress(head) + packed_part(content) * (size // PART)


@cache
def packed_part(content: bytes) -> bytes:
    return gzip.compress(content * PART)


def table(rows: Sequence[Mapping[str, Any]], **metadata: str) -> bytes:
    """A parquet file."""
    content = pyarrow.Table.from_pylist([dict(row) for row in rows])
    out = io.BytesIO()
    parquet.write_table(content.replace_schema_metadata(metadata), out)
    return out.getvalue()


def table_of_objects() -> bytes:
    """A parquet file whose column claims to be of a Python type, which comes as a pickle."""
    about = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": PICKLE}
    fields = [pyarrow.field(name, pyarrow.string(), metadata=about) for name in PAIR]
    out = io.BytesIO()
    parquet.write_table(pyarrow.table([[value] * 4 for value in PAIR.values()], schema=pyarrow.schema(fields)), out)
    return out.getvalue()


GOOD_TABLE = table([PAIR] * 8)
GIB = 2**30
ROWS: Mapping[str, tuple[str, str | bytes, str | None]] = {
    "a deep nest": (
        "r.jsonl",
        '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "malformed JSON: it is nested too deeply",
    ),
    "a deep nest further down": (
        "r.jsonl",
        f"{LINE}\n" * 30 + "[" * 100_000 + "]" * 100_000,
        "r.jsonl:31: malformed JSON",
    ),
    "a deep nest of objects": ("r.jsonl", '{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "a deep nest in an array": ("r.json", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "a nest that can be read": ("r.jsonl", LINE[:-1] + ', "x": ' + "[" * 900 + "]" * 900 + "}", None),
    "a number of many digits": ("r.jsonl", long_number(10**6), "malformed JSON: Exceeds the limit"),
    "a number of many digits further down": (
        "r.jsonl",
        f"{LINE}\n" * 30 + long_number(10**6),
        "r.jsonl:31: malformed JSON .Exceeds the limit",
    ),
    "a number of many digits in an array": ("r.json", f"[{long_number(10**6)}]", "malformed JSON: Exceeds the limit"),
    "an infinite number": ("r.jsonl", LINE.replace('"w1 w2 "', "1e999"), "1e999 is beyond"),
    "infinity": ("r.jsonl", LINE.replace('"w1 w2 "', "-Infinity"), "-Infinity is not a number"),
    "a score that is none": (
        "r.jsonl",
        '{"prompt": "w1", "completions": ["w1", "w2"], "scores": [NaN, 1]}',
        "NaN is not a number",
    ),
    "a score beyond a float": (
        "r.jsonl",
        '{"prompt": "w1", "completions": ["w1", "w2"], "scores": [' + "9" * 400 + ", 1]}",
        "a score is beyond the range of a number",
    ),
    "a key twice": ("r.jsonl", LINE[:-1] + ', "prompt": "w5"}', "'prompt' is there twice"),
    "half a pair": ("r.jsonl", f"{LINE}\n" * 8 + LINE.replace("w3", "\\ud800"), "chosen holds half of a character"),
    "NUL in a text": ("r.jsonl", f"{LINE}\n" * 8 + LINE.replace("w3", "w3\\u0000"), None),
    "NUL in the file": ("r.jsonl", LINE.replace("w3", "w3\x00"), "Invalid control character"),
    "terminal codes": ("r.jsonl", f"{LINE}\n" * 8 + '{"\\u001b]0;owned\\u0007": "\\u001b[2J"}', "prompt is null"),
    "terminal codes in what is malformed": (
        "r.jsonl",
        f"{LINE}\n" * 30 + '{"\x1b]0;owned\x07',
        r"at '\\x1b\]0;owned\\x07'",
    ),
    "wrong types": ("r.jsonl", '{"prompt": 1, "chosen": [], "rejected": {}}', "no chat template"),
    "no object": ("r.jsonl", "null", "holds NoneType"),
    "arrays a line": ("r.jsonl", "[1]\n[2]\n", "holds int"),
    "a large key": ("r.jsonl", LINE[:-1] + f', "{"k" * 10**6}": 1}}', None),
    "many keys": ("r.jsonl", LINE[:-1] + "".join(f', "k{n}": 1' for n in range(50_000)) + "}", None),
    "ever new keys": ("r.jsonl", "".join(LINE[:-1] + f', "k{n}": 1}}\n' for n in range(5_000)), None),
    "a large text": ("r.jsonl", f"{LINE}\n" * 8 + LINE.replace("w3", "w3 " * 10**6), None),
    "one token of a megabyte": ("r.jsonl", f"{LINE}\n" * 8 + LINE.replace("w3", "w" * 10**6), None),
    "a mark in the middle": ("r.jsonl", f"{LINE}\n\ufeff{LINE}", "Unexpected UTF-8 BOM"),
    "UTF-16": ("r.jsonl", LINE.encode("utf-16"), "is not UTF-8"),
    "Latin-1": ("r.jsonl", f"{LINE}\n".encode() * 30 + b'{"prompt": "\xe9"}', "is not UTF-8"),
    "a line cut off": ("r.jsonl", f"{LINE}\n" * 30 + LINE[:-5], "r.jsonl:31: malformed"),
    "line ends of three kinds": ("r.jsonl", f"{LINE}\r\n{LINE}\n" * 8 + f"{LINE}\u2028{LINE}", "Extra data"),
    "a bomb of white space": ("r.jsonl.gz", packed(4 * GIB), "without a row"),
    "a bomb of empty lines": ("r.jsonl.gz", packed(4 * GIB, b"\n"), "without a row"),
    "a bomb of one line": ("r.jsonl.gz", packed(4 * GIB, b"w", b'{"prompt": "'), "without a row"),
    "a bomb further down": (
        "r.jsonl.gz",
        packed(4 * GIB, b"w", f"{LINE}\n".encode() * 30 + b'{"prompt": "'),
        "r.jsonl.gz:31: 67,108,865 bytes without a row",
    ),
    "a bomb that is called plain": ("r.jsonl", packed(4 * GIB, b"w", b'{"prompt": "'), "without a row"),
    "a bomb of an array": ("r.json.gz", packed(4 * GIB, b" ", b"["), "without a row"),
    "a bomb of an array further down": (
        "r.json.gz",
        packed(4 * GIB, b"w", b"[" + f"{LINE},".encode() * 30 + b'"'),
        "an array of more than",
    ),
    "an archive in an archive": ("r.jsonl.gz", gzip.compress(gzip.compress(LINE.encode())), "is not UTF-8"),
    "an archive cut off": ("r.jsonl.gz", gzip.compress(f"{LINE}\n".encode() * 99)[:-20], "broken gzip archive"),
    "an archive with a wrong checksum": (
        "r.jsonl.gz",
        gzip.compress(f"{LINE}\n".encode() * 99)[:-8] + b"\0" * 8,
        "broken gzip archive .CRC",
    ),
    "a CSV with NUL": ("r.csv", "prompt,chosen,rejected\na,b,c\x00\n", "candidates are identical"),
    "a CSV with a quote left open": (
        "r.csv",
        'prompt,chosen,rejected\na,b,c\n"' + "x,y\n" * 10_000,
        "a quote is opened and never closed",
    ),
    "a CSV with more cells than columns": (
        "r.csv",
        "prompt,chosen,rejected\n" + "a,b,c,d\n" * 30,
        "r.csv:2: 4 cells, and the header names 3 columns",
    ),
    "a CSV with fewer cells than columns": (
        "r.csv",
        "prompt,chosen,rejected\n" + "a,b,c\n" * 30 + "a\n",
        "r.csv:32: 1 cells, and the header names 3 columns",
    ),
    "a CSV of many columns": (
        "r.csv",
        ",".join(f"c{n}" for n in range(20_000)) + "\n" + "1," * 19_999 + "1\n",
        "column 'chosen' is missing",
    ),
    "a CSV in UTF-16": ("r.csv", "prompt,chosen,rejected\na,b,c\n".encode("utf-16"), "r.csv:1: not UTF-8"),
    "a CSV in Latin-1 further down": (
        "r.csv",
        b"prompt,chosen,rejected\n" + b"a,b,c\n" * 30 + b"\xe9,b,c\n",
        "r.csv:32: not UTF-8",
    ),
    "a CSV with formulas": ("r.csv", "prompt,chosen,rejected\n" + "=cmd|'/C calc'!A0 ,w1 ,w2 \n" * 8, None),
    "a CSV with a list that is code": (
        "r.csv",
        "prompt,completions,scores\n" + f'a,"[exec(\'{CODE}\')]","[1, 0]"\n' * 8,
        "not a list written as JSON",
    ),
    "a CSV with a deep list": (
        "r.csv",
        "prompt,completions,scores\n" + f'a,"{"[" * 100_000}","[1]"\n' * 8,
        "not a list written as JSON: .*nested too deeply",
    ),
    "a table cut off": ("r.parquet", GOOD_TABLE[: len(GOOD_TABLE) // 2], "is not a parquet file"),
    "a table without beginning": ("r.parquet", GOOD_TABLE[len(GOOD_TABLE) // 2 :], "is not a parquet file"),
    "a table with a long end": (
        "r.parquet",
        GOOD_TABLE[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1",
        "is not a parquet file",
    ),
    "a table with zeros inside": ("r.parquet", GOOD_TABLE[:20] + bytes(60) + GOOD_TABLE[80:], "cannot be read: "),
    "a table of objects": ("r.parquet", table_of_objects(), None),
    "a table of bytes": ("r.parquet", table([dict.fromkeys(PAIR, b"\xff")] * 8), "prompt is bytes"),
    "a table with a schema of its own": (
        "r.parquet",
        table([PAIR] * 8, huggingface="{" * 10**5),
        "r.parquet: cannot be read",
    ),
    "a table of nulls": ("r.parquet", table([dict.fromkeys(PAIR)] * 8), "prompt is null"),
}
"""Rows of data: the name of the file, and what is in it."""

SAVED = {"_data_files": [{"filename": "../../rows.jsonl"}], "_split": None, "_format_type": None}


def folder_with(name: str, **files: str | bytes) -> Callable[[Path], object]:
    """Makes a folder; ``__`` in the name of a file stands for a dot."""

    def make(place: Path) -> None:
        (place / name).mkdir()
        for file, content in files.items():
            (place / name / file.replace("__", ".")).write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )

    return make


FOLDERS = {
    "a folder with a script": (folder_with("r", r__py=CODE), "a folder without data files"),
    "a saved table that lies elsewhere": (
        folder_with("r", state__json=json.dumps(SAVED), dataset_info__json="{}"),
        "cannot be read",
    ),
    "a saved table that is none": (
        folder_with("r", state__json="[" * 10**5, dataset_info__json="{}"),
        "a saved data set that cannot be read",
    ),
    "a folder in itself": (
        lambda place: ((place / "r").mkdir(), (place / "r" / "r").symlink_to("../r")),
        "without data files",
    ),
    "a pipe": (lambda place: os.mkfifo(place / "r"), "holds no file ending"),
    "an endless file": (lambda place: (place / "r").symlink_to("/dev/zero"), "holds no file ending"),
}

CORPUS: list[Hostile] = [
    *(
        Hostile(
            "template",
            name,
            written("t.jinja", text),
            says,
            (*GIVEN, "--data", "talks.jsonl", "--chat_template", "t.jinja"),
            is_slow=says in (ENDLESS, LARGE),
        )
        for name, (text, says) in TEMPLATES.items()
    ),
    *(
        Hostile("config", name, written("h.yaml", text), says, ("--config", "h.yaml"))
        for name, (text, says) in (DOCUMENTS | VALUES).items()
    ),
    *(
        Hostile("rows", name, written(file, content), says, (*GIVEN, "--data", file), is_slow="bomb" in name)
        for name, (file, content, says) in ROWS.items()
    ),
    *(Hostile("rows", name, make, says, (*GIVEN, "--data", "r")) for name, (make, says) in FOLDERS.items()),
]
