"""``alignkit serve``: what is started for what, what is merged before, and that it ends when it is told to."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from alignkit.errors import ConfigError
from alignkit.programs import serve
from tests.scripts.tiny import byte_tokenizer, save_adapter, save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("serve") / "base", seed=3)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    place = save_adapter(base, base.with_name("tuned"), r=12, rank_pattern={"q_proj": 20})
    byte_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that are taken to be there."""
    packages: set[str] = set()
    monkeypatch.setattr(serve, "find_spec", lambda name: name if name in packages else None)
    return packages


def dry(capsys: pytest.CaptureFixture[str], *words: Any) -> list[str]:
    """Lines that a dry run prints, without empty ones."""
    own = list(map(str, words))
    at = own.index("--") if "--" in own else len(own)
    assert serve.main([*own[:at], "--dry_run", *own[at:]], "alignkit serve") == 0
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_vllm_serves_an_adapter_on_its_base(
    base: Path, adapter: Path, installed: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    installed |= {"vllm", *serve.NEEDED["transformers"]}
    command, _, request = dry(capsys, adapter, "--port", "8001", "--", "--gpu-memory-utilization", "0.8")
    expected = f"vllm serve {base} --host localhost --port 8001 --dtype auto --enable-lora --max-lora-rank 32 "
    expected += f"--lora-modules tuned={adapter} --tokenizer {adapter} --gpu-memory-utilization 0.8"
    assert command == expected
    words = shlex.split(request)
    assert words[2] == "http://localhost:8001/v1/chat/completions"
    body = json.loads(words[-1])
    assert body["model"] == "tuned" and body["messages"] == [{"role": "user", "content": "Say hello."}]


def test_vllm_serves_a_model(base: Path, installed: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    installed.add("vllm")
    command, *_ = dry(capsys, base, "--name", "mine", "--trust_remote_code", "--host", "0.0.0.0")
    assert command == (
        f"vllm serve {base} --host 0.0.0.0 --port 8000 --dtype auto --trust-remote-code --served-model-name mine"
    )
    command, *_ = dry(capsys, "org/model", "--revision", "v2")
    assert command.endswith("--revision v2 --served-model-name model")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_dora": True}, "vLLM puts no adapter with use_dora on a base"),
        ({"modules_to_save": ["lm_head"]}, "vLLM puts no adapter with modules_to_save on a base"),
        ({"r": 1024}, "vLLM takes ranks up to 512, and this one has 1024"),
        ({"peft_type": "IA3"}, "vLLM puts LoRA adapters on a base, and this is one of kind IA3"),
    ],
)
def test_what_vllm_cannot_put_on_a_base_is_merged(
    changes: dict[str, Any],
    why: str,
    base: Path,
    adapter: Path,
    installed: set[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed.add("vllm")
    other = tmp_path / "other"
    other.mkdir()
    for file in adapter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (other / "adapter_config.json").write_text(json.dumps(config))
    told, merge, command, *_ = dry(capsys, other)
    assert told == f"the adapter is merged into its base first: {why}"
    assert merge == f"alignkit merge --adapter {other} --output MERGED --model {base}"
    assert command == "vllm serve MERGED --host localhost --port 8000 --dtype auto --served-model-name other"


def test_transformers_serves_a_whole_model(
    base: Path, adapter: Path, installed: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed |= set(serve.NEEDED["transformers"])
    told, merge, command, *_ = dry(capsys, adapter)
    assert "the server of transformers takes whole models" in told and merge.startswith("alignkit merge --adapter")
    assert command == "transformers serve MERGED --host localhost --port 8000 --dtype auto"
    plain = byte_tokenizer()
    plain.chat_template = None
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "plain")
    plain.save_pretrained(tmp_path / "plain")
    command, _, request = dry(capsys, tmp_path / "plain")
    assert shlex.split(request)[2].endswith("/v1/completions")
    assert json.loads(shlex.split(request)[-1])["model"] == str(tmp_path / "plain")


@pytest.mark.parametrize(
    ("words", "there", "message"),
    [
        (
            ["{base}"],
            [],
            r"Install one: pip install vllm .not installed: vllm.; or pip install 'transformers.serving.'",
        ),
        (["{base}", "--engine", "vllm"], ["fastapi"], r"Install one: pip install vllm .not installed: vllm.$"),
        (["{base}"], ["fastapi", "uvicorn", "pydantic"], r"not installed: openai"),
        (["{base}@2"], serve.NEEDED["transformers"], "reads what follows @ as a revision. Rename it"),
        (["nowhere/at/all"], ["vllm"], r"the model 'nowhere/at/all' does not exist"),
        (["{base}", "--model", "{base}"], ["vllm"], "is not a saved adapter"),
        (["{base}", "--name", "x"], serve.NEEDED["transformers"], "by its path alone: leave the option out"),
        (["{base}", "--prot", "1"], ["vllm"], "unknown option --prot; did you mean --port"),
    ],
)
def test_what_cannot_work(words: list[str], there: list[str], message: str, base: Path, installed: set[str]) -> None:
    installed |= set(there)
    if not base.with_name("base@2").exists():
        base.with_name("base@2").symlink_to(base)
    with pytest.raises(ConfigError, match=message):
        serve.main([word.format(base=base) for word in words], "alignkit serve")


def test_a_sparse_adapter_is_exported_first(adapter: Path, installed: set[str], tmp_path: Path) -> None:
    installed.add("vllm")
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"peft_type": "ALIGNKIT_PAT"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="removes parts of its base.*alignkit prune --adapter"):
        serve.main([str(tmp_path)], "alignkit serve")


def test_the_server_is_started_waited_for_and_stopped(
    base: Path, installed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in in the place of vLLM, which writes its words down and stops when it is told to."""
    installed.add("vllm")
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        f"open({str(tmp_path / 'words')!r}, 'w').write(json.dumps(sys.argv[1:]))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    before = signal.getsignal(signal.SIGTERM)
    assert serve.main([str(base)], "alignkit serve") == 7
    assert json.loads((tmp_path / "words").read_text())[:2] == ["serve", str(base)]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(
    any(find_spec(name) is None for name in serve.NEEDED["transformers"]),
    reason="the server of transformers is not installed: pip install 'transformers[serving]'",
)
def test_the_server_of_transformers_answers(adapter: Path, tmp_path: Path) -> None:
    """The adapter is merged, served, asked by the very request that is shown, and nothing is left behind."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "alignkit", "serve", str(adapter), "--port", "8765"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as server:
        request = next(line for line in server.stdout if line.startswith("curl "))
        _, _, address, _, header, _, body = shlex.split(request)
        name, _, value = header.partition(": ")
        post = urllib.request.Request(address, body.encode(), {name: value})
        answer = None
        for _ in range(240):
            try:
                answer = json.loads(urllib.request.urlopen(post, timeout=60).read())
                break
            except OSError:
                time.sleep(0.25)
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert answer is not None and answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] > 0
    assert not list(tmp_path.glob("alignkit-merged-*"))
