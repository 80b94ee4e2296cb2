"""Merges that are kept, and merges that are refused without leaving anything behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.errors import ModelError
from alignkit.hub.upload import plan_upload
from alignkit.models import export
from alignkit.models.export import LogitsDifference, MergeReport, logits_difference
from alignkit.models.files import check_tensors, read_adapter
from alignkit.models.loading import ModelSource, load_model
from tests.scripts.conftest import Script
from tests.scripts.tiny import save_adapter

PROMPT = "What is 2 + 2?"


def logits(model: torch.nn.Module, directory: Path) -> Tensor:
    """Logits of a text."""
    ids = AutoTokenizer.from_pretrained(directory)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def tuned_logits(base: Path, adapter: Path) -> Tensor:
    """Base + adapter, unmerged."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter).eval(), base)


def left_behind(folder: Path) -> list[str]:
    """Everything in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def test_the_merged_model_says_what_base_and_adapter_say(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "merged"
    assert run_script("merge_adapter", "--adapter", assets / "adapter", "--output", output) == 0
    model, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"] and model.dtype == torch.float32
    tuned = tuned_logits(assets / "base", assets / "adapter")
    base = logits(AutoModelForCausalLM.from_pretrained(assets / "base"), assets / "base")
    assert (tuned - base).abs().max() > 0.3
    assert torch.allclose(logits(model, output), tuned, atol=1e-4)
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} <= set(left_behind(output))
    assert left_behind(output.parent) == ["merged"]
    out = capsys.readouterr().out
    assert "error of the merge" in out and "weights float32, tolerance 0.001: ok" in out


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"use_dora": True}),
        ({}, {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
        ({}, {"modules_to_save": ["lm_head"]}),
        ({"dtype": "bfloat16"}, {}),
        ({"dtype": "float16"}, {}),
    ],
)
def test_kinds_of_adapters_and_types(
    options: dict[str, str], settings: dict[str, object], assets: Path, tmp_path: Path, run_script: Script
) -> None:
    adapter = save_adapter(assets / "base", tmp_path / "adapter", **settings)
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    assert run_script("merge_adapter", "--adapter", adapter, "--output", tmp_path / "merged", *words) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert str(model.dtype) == f"torch.{options.get('dtype', 'float32')}"
    difference = (logits(model.float(), tmp_path / "merged") - tuned_logits(assets / "base", adapter)).abs().max()
    assert difference < export.TOLERANCES[options.get("dtype", "float32")]


TIED = {
    "LoRA on the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "the embedding in full": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "the head in full": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "both as one": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "single tokens of both": ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}, True),
    "neither": ({"target_modules": ["q_proj"]}, True),
}


@pytest.mark.parametrize(("settings", "stays_tied"), TIED.values(), ids=TIED.keys())
def test_tied_weights_that_the_adapter_parts(
    settings: dict[str, object], stays_tied: bool, assets: Path, tmp_path: Path, run_script: Script
) -> None:
    """Embedding and head of the base are one weight; the config of the merged model says whether they still are."""
    adapter = save_adapter(assets / "base", tmp_path / "adapter", **settings)
    assert run_script("merge_adapter", "--adapter", adapter, "--output", tmp_path / "merged") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(model, tmp_path / "merged"), tuned_logits(assets / "base", adapter), atol=1e-4)
    assert model.config.tie_word_embeddings is stays_tied
    saved = check_tensors(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in saved) is not stays_tied


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_that_is_quantised_already(
    kind: str, assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged into the values its weights stand for, as bitsandbytes gives them; another kind is refused."""
    pytest.importorskip("bitsandbytes")
    source = ModelSource(str(assets / "wide"), quantization=kind)
    load_model(source, "cpu").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(assets / "wide").save_pretrained(tmp_path / "base")
    adapter = save_adapter(assets / "wide", tmp_path / "adapter")
    words = ("--adapter", adapter, "--model", tmp_path / "base", "--num_prompts", "2", "--tolerance", "5")
    assert run_script("merge_adapter", *words, "--output", tmp_path / "merged") == 0
    assert f"base quantised to {kind}" in capsys.readouterr().out
    dense = load_model(source, "cpu").dequantize(dtype=torch.float32)
    expected = PeftModel.from_pretrained(dense, adapter).merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(merged[name], expected[name], atol=1e-6, rtol=0)
    other = {"nf4": "int8", "int8": "nf4"}[kind]
    assert run_script("merge_adapter", *words, "--output", tmp_path / "no", "--quantization", other) == 2
    assert f"quantised already ({kind})" in capsys.readouterr().err


def test_a_tolerance_that_is_missed_refuses(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--adapter", assets / "adapter", "--output", tmp_path / "merged", "--dtype", "bfloat16")
    assert run_script("merge_adapter", *words, "--tolerance", "1e-6") == 2
    err = capsys.readouterr().err
    assert "nothing was written" in err and "tolerance 1e-06" in err and "differs from base + adapter" in err
    assert left_behind(tmp_path) == []


def test_a_wrong_merge_is_found(
    assets: Path,
    tmp_path: Path,
    run_script: Script,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What PEFT's merge would do if it scaled the update wrongly."""
    merge = BaseTuner.merge_and_unload

    def scaled(model: BaseTuner, **options: object) -> torch.nn.Module:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= 1.1
        return merge(model, **options)

    monkeypatch.setattr(BaseTuner, "merge_and_unload", scaled)
    output = tmp_path / "merged"
    assert run_script("merge_adapter", "--adapter", assets / "adapter", "--output", output) == 2
    assert "the merge is refused" in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_rounding_that_swallows_the_adapter_is_refused(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(assets / "base", tmp_path / "small", scale=0.002)
    words = ("--adapter", adapter, "--output", tmp_path / "merged")
    assert run_script("merge_adapter", *words, "--dtype", "bfloat16") == 2
    assert "rounding to bfloat16 swallows the adapter" in capsys.readouterr().err
    assert run_script("merge_adapter", *words, "--dtype", "float32") == 0


@pytest.mark.parametrize(
    ("error", "effect", "quantization", "expected"),
    [
        (LogitsDifference(0.4, 1e-4, 9), LogitsDifference(3.0, 1e-1, 9), "none", None),
        (LogitsDifference(0.6, 1e-4, 9), LogitsDifference(3.0, 1e-1, 9), "none", "up to 0.6 in a logit"),
        (LogitsDifference(float("nan"), 0.0, 9), LogitsDifference(3.0, 1e-1, 9), "none", "up to nan in a logit"),
        (LogitsDifference(0.4, 1e-1, 9), LogitsDifference(0.3, 1e-1, 9), "none", "swallows"),
        (LogitsDifference(0.4, 1e-1, 9), LogitsDifference(0.3, 1e-1, 9), "nf4", None),
        (LogitsDifference(9e-4, 1e-9, 9), LogitsDifference(0.0, 0.0, 9), "none", None),
    ],
)
def test_verdicts(error: LogitsDifference, effect: LogitsDifference, quantization: str, expected: str | None) -> None:
    problem = MergeReport(error, effect, "bfloat16", quantization, 0.5).problem
    assert problem is None if expected is None else expected in (problem or "")


def test_logits_difference_by_hand() -> None:
    """One position with odds 3 : 1 against 1 : 1 and one without a difference."""
    first = [torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[0.0, 0.0]])]
    second = [torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[5.0, 5.0]])]
    found = logits_difference(first, second)
    expected = 0.75 * torch.tensor(0.75 / 0.5).log() + 0.25 * torch.tensor(0.25 / 0.5).log()
    assert found.kl == pytest.approx(float(expected) / 2, abs=1e-7)
    assert (found.max_abs, found.positions) == (5.0, 2)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_dequantised(
    kind: str, assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights written are those training saw, not those before quantisation; run.json says how it saw them."""
    pytest.importorskip("bitsandbytes")
    adapter = save_adapter(assets / "wide", tmp_path / "adapter")
    config = {"quantization": {"value": kind, "source": "command line"}}
    (adapter / "run.json").write_text(json.dumps({"alignkit_run": 1, "config": config}))
    words = ("--adapter", adapter, "--num_prompts", "2")
    assert run_script("merge_adapter", *words, "--output", tmp_path / "merged", "--tolerance", "5") == 0
    assert f"base quantised to {kind}" in capsys.readouterr().out
    assert run_script("merge_adapter", *words, "--output", tmp_path / "plain", "--quantization", "none") == 0
    merged, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "plain"))
    assert "quantization_config" not in merged.config.to_dict()
    weights = [model.state_dict()["model.layers.0.mlp.up_proj.weight"] for model in (merged, plain)]
    difference = (weights[0] - weights[1]).abs()
    assert 1e-4 < difference.max() < 0.3 and difference.mean() < 0.1


def test_the_card(assets: Path, tmp_path: Path, run_script: Script) -> None:
    adapter = save_adapter(assets / "base", tmp_path / "adapter")
    tags = '[alignkit, flex_dpo, lora, "base_model:adapter:/x"]'
    (adapter / "README.md").write_text(f"---\nlibrary_name: peft\nlicense: mit\ntags: {tags}\n---\n# The adapter\n")
    assert run_script("merge_adapter", "--adapter", adapter, "--output", tmp_path / "merged") == 0
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["alignkit", "flex_dpo"],
    }
    assert str(assets) not in str(card) and "base, with a LORA adapter merged" in card.text
    assert "# The adapter" in (tmp_path / "merged" / "adapter_card.md").read_text()
    upload = plan_upload(tmp_path / "merged", "ada/merged")
    assert upload.kind == "model" and upload.left_out == ("adapter_card.md", "written_files.json")


def test_nothing_is_overwritten(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    words = ("merge_adapter", "--adapter", assets / "adapter", "--output")
    for flags in ((), ("--overwrite",)):
        assert run_script(*words, output, *flags) == 2
        assert "is not empty, and without written_files.json nobody knows" in capsys.readouterr().err
        assert run_script(*words, output / "mine.txt", *flags) == 2
        assert "is a file" in capsys.readouterr().err
    assert left_behind(output) == ["mine.txt"]
    (output / "mine.txt").unlink()
    assert run_script(*words, output) == 0
    assert run_script(*words, output) == 2
    assert "is there already: write another name, or --overwrite to replace it" in capsys.readouterr().err


def test_an_earlier_merge_is_replaced_by_its_own_list(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    words = ("merge_adapter", "--adapter", assets / "adapter", "--output", output, "--overwrite")
    assert run_script(*words) == 0
    whole = {name: (output / name).read_bytes() for name in left_behind(output)}
    for name in ("mine.txt", "model.safetensors"):
        (output / name).write_text("mine")
    (output / "written_files.json").write_text(json.dumps({"files": [*whole, "older.safetensors", "../out.txt"]}))
    (output / "older.safetensors").write_text("of an earlier merge, in more files")
    (tmp_path / "out.txt").write_text("no list reaches this")
    assert run_script(*words) == 0
    assert {name: (output / name).read_bytes() for name in left_behind(output)} == whole | {"mine.txt": b"mine"}
    assert left_behind(tmp_path) == ["merged", "out.txt"]
    # What an earlier merge is merged with again is an input.
    assert run_script(*words, "--model", output) == 2
    assert "is an input, or holds one" in capsys.readouterr().err
    (output / "model.safetensors").unlink()
    (output / "written_files.json").write_text(json.dumps({"files": ["config.json"]}))
    assert run_script(*words) == 2
    assert "is in the way: no earlier call wrote it" in capsys.readouterr().err
    assert (output / "config.json").read_bytes() == whole["config.json"]


def test_texts_of_the_users_own_rows(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--adapter", assets / "adapter", "--data", assets / "pairs.jsonl", "--num_prompts", "2")
    assert run_script("merge_adapter", *words, "--output", tmp_path / "merged") == 0
    texts = ["<|user|>What is 0 + 0?<|assistant|>It is 0<|end|>", "<|user|>What is 1 + 1??<|assistant|>It is 2.<|end|>"]
    tokens = sum(len(AutoTokenizer.from_pretrained(assets / "base")(text)["input_ids"]) for text in texts)
    assert f"{tokens} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "expected"), [("other", "size mismatch"), ("none", "does not exist")])
def test_the_wrong_base(
    model: str,
    expected: str,
    assets: Path,
    tmp_path: Path,
    run_script: Script,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--adapter", assets / "adapter", "--model", assets / model, "--output", tmp_path / "merged")
    assert run_script("merge_adapter", *words) == 2
    assert expected in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_an_adapter_of_virtual_tokens_has_nothing_to_merge(assets: Path, tmp_path: Path, run_script: Script) -> None:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(assets / "base"), settings).save_pretrained(tmp_path / "p")
    with pytest.raises(ModelError, match="adds virtual tokens and no weights"):
        export.merge_adapter(
            read_adapter(tmp_path / "p"),
            export.ModelSource(str(assets / "base")),
            tmp_path / "merged",
            tokenizer=AutoTokenizer.from_pretrained(assets / "base"),
            prompts=[[5, 6, 7]],
        )


def test_an_output_inside_a_file(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(ModelError, match="pairs.jsonl, which is a file"):
        export.check_output(tmp_path / "pairs.jsonl" / "x")
