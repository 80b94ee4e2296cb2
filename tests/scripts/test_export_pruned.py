"""``alignkit prune``: what goes, what is written beside the smaller model, and what is refused before it is loaded."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from alignkit.errors import ModelError
from alignkit.hub.upload import plan_upload
from alignkit.models._atp_layers import AtpConfig
from alignkit.models._pat_layers import PatConfig, mask_of
from alignkit.models.adapter_config import SPARSE_KINDS, SPARSE_PREFIX
from alignkit.models.export import dequantized
from alignkit.models.loading import ModelSource, load_model
from alignkit.models.sparse_adapter import equip
from alignkit.programs.prune import command_line
from alignkit.pruning import verify
from alignkit.pruning.amounts import kept_sizes
from alignkit.pruning.fresh_process import look
from alignkit.pruning.masks import masked
from alignkit.pruning.plan import PruningPlan
from tests.scripts.conftest import Script
from tests.scripts.tiny import byte_tokenizer, randomize, save_adapter, save_model, tiny_model, write_rows

PLAN = PruningPlan(hidden=tuple(range(24)), ffn=(tuple(range(40)), tuple(range(24, 64))))
TEXT = [[5, 60, 70, 80, 90, 33]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with worked answers, of different lengths."""
    found = [{"prompt": f"{i} + {i}?" + "?" * (i % 3), "completion": f" {2 * i}. #### {2 * i}"} for i in range(7)]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", found)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fresh process would find, without the seconds it takes to start; one test does take them."""

    def ask(directory: Path, texts: Any, folder: Path) -> dict[str, Any]:
        return look(str(directory), texts, str(folder / "logits.safetensors"))

    monkeypatch.setattr(verify, "_ask", ask)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(torch.tensor(TEXT)).logits
    return found


def test_a_model_is_pruned_by_importance(
    assets: Path, rows: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pruned"
    sizes = ("--hidden", "0.25", "--ffn", "0.3", "--drop_layers", "1")
    scored = ("--criterion", "activation", "--data", rows, "--num_rows", "5")
    measured = ("--evaluate", rows, "--answer_column", "completion", "--max_new_tokens", "3", "--batch_size", "3")
    assert run_script("export_pruned", "--model", assets / "base", "--output", output, *sizes, *scored, *measured) == 0
    out = capsys.readouterr().out
    assert "ffn: 0.3 of 64 feed-forward channels would leave 44.8; 45 are kept (29.7% go)" in out
    assert "loads it whole" in out and f"written to {output}" in out

    model, loading = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(loading.values())
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (24, 45, 1)
    plan = PruningPlan.load(output)
    with masked(tiny_model(), plan) as dense:
        assert torch.allclose(logits(model), logits(dense), atol=1e-4)

    report = json.loads((output / "pruning_report.json").read_text())
    assert report["plan"] | {"tokens": 0} == {
        "sha256": plan.digest(), "file": "pruning_plan.json", "by": "activation", "rows": 5, "tokens": 0
    }  # fmt: skip
    assert report["sizes"]["after"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["sizes"]["after"]["bytes"] == (output / "model.safetensors").stat().st_size
    assert [report["sizes"][when]["kv_cache_bytes_per_token"] for when in ("before", "after")] == [256, 128]
    found = report["evaluation"]["figures"]
    for name, evaluated in (("dense", tiny_model()), ("pruned", model)):
        assert found[name]["nats_per_token"]["mean"] == pytest.approx(nats_per_token(evaluated, rows), abs=1e-5)
        assert found[name]["exact_match"]["rows"] == 7
    difference = found["pruned"]["minus dense"]["nats_per_token"]["mean"]
    assert difference == pytest.approx(
        found["pruned"]["nats_per_token"]["mean"] - found["dense"]["nats_per_token"]["mean"]
    )
    assert str(tmp_path) not in json.dumps(report) and str(assets) not in json.dumps(report)

    card = ModelCard.load(output / "README.md")
    assert card.data.to_dict()["tags"] == ["alignkit", "pruned"]
    assert "| hidden channels | 32 | 24 | 0.75 |" in card.text and "by importance (activation) on 5 rows" in card.text
    assert "| bytes of KV cache a token | 256 | 128 | 0.50 |" in card.text
    upload = plan_upload(output, "ada/pruned")
    assert {"pruning.png", "pruning_plan.json", "pruning_report.json"} <= {file.path for file in upload.files}
    assert upload.left_out == ("written_files.json",)


@torch.no_grad()
def nats_per_token(model: Any, rows: Path) -> float:
    """Mean over the tokens of all completions and their ends, row by row and without padding."""
    tokenizer, total, count = byte_tokenizer(), 0.0, 0
    for row in map(json.loads, rows.read_text().splitlines()):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        logps = model.eval()(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        total, count = total - float(logps[len(prompt) - 1 :].sum()), count + ids.shape[1] - len(prompt)
    return total / count


def test_a_lora_adapter_is_merged_and_pruned_by_a_plan(
    assets: Path, rows: Path, tmp_path: Path, run_script: Script, in_this_process: None
) -> None:
    PLAN.save(tmp_path)
    words = ("--adapter", assets / "adapter", "--plan", tmp_path, "--output", tmp_path / "out", "--dtype", "bfloat16")
    assert run_script("export_pruned", *words, "--keep_tied", "--evaluate", rows) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.dtype == torch.bfloat16 and exported.config.tie_word_embeddings
    base = AutoModelForCausalLM.from_pretrained(assets / "base")
    merged = PeftModel.from_pretrained(base, assets / "adapter").merge_and_unload()
    with masked(merged, PLAN) as dense:
        assert (logits(exported.float()) - logits(dense)).abs().max() < 0.5
        assert (logits(tiny_model()) - logits(dense)).abs().max() > 1
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert list(report["evaluation"]["figures"]) == ["base", "tuned", "pruned"]
    assert report["made_of"] == {"model": "base", "revision": None, "adapter": "adapter", "adapter_kind": "LORA"}
    assert report["plan"]["by"] == "plan"


def test_a_lora_adapter_is_merged_into_the_weights_that_training_saw(
    assets: Path, tmp_path: Path, run_script: Script, in_this_process: None
) -> None:
    """Trained on a quantised base, by its run.json: the exported weights are those of the dequantised one."""
    pytest.importorskip("bitsandbytes")
    adapter = save_adapter(assets / "wide", tmp_path / "adapter")
    config = {"quantization": {"value": "nf4", "source": "command line"}}
    (adapter / "run.json").write_text(json.dumps({"alignkit_run": 1, "config": config}))
    PruningPlan(layers=(1,)).save(tmp_path)
    words = ("--adapter", adapter, "--plan", tmp_path, "--output", tmp_path / "out")
    assert run_script("export_pruned", *words) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in exported.config.to_dict()
    plain = dequantized(load_model(ModelSource(str(assets / "wide"), quantization="nf4"), "cpu"))
    merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    stored, kept = exported.state_dict(), "mlp.up_proj.weight"
    torch.testing.assert_close(stored[f"model.layers.0.{kept}"], merged[f"model.layers.1.{kept}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("keep_tied", [False, True])
def test_what_pat_learnt_is_exported(
    keep_tied: bool, assets: Path, tmp_path: Path, run_script: Script, in_this_process: None
) -> None:
    """Its mask, its modules and its low-rank factors; more can go by a plan on other axes."""
    model = AutoModelForCausalLM.from_pretrained(assets / "base")
    writers = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")]
    config = PatConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", base_model_name_or_path=str(assets / "base"),
        hsm_writers=writers, hsm_rank=3, hsm_width=24, hsm_keep_tied=keep_tied,
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    equip(wrapped)
    randomize(wrapped, 0.05, 1)
    mask_of(wrapped, "default").harden()
    wrapped.save_pretrained(tmp_path / "pat")
    PruningPlan(ffn=PLAN.ffn).save(tmp_path)
    words = ("--adapter", tmp_path / "pat", "--plan", tmp_path, "--output", tmp_path / "out")
    assert run_script("export_pruned", *words) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.hidden_size == 24 and exported.config.tie_word_embeddings is keep_tied
    assert exported.config.intermediate_size == 40
    for index, kept in enumerate(PLAN.ffn or ()):
        down = wrapped.get_submodule(f"base_model.model.model.layers.{index}.mlp.down_proj")
        keep = torch.zeros(64)
        keep[list(kept)] = 1
        down.register_forward_pre_hook(lambda _, inputs, keep=keep: (inputs[0] * keep, *inputs[1:]))
    assert torch.allclose(logits(exported), logits(wrapped), atol=1e-4)
    assert json.loads((tmp_path / "out" / "pruning_report.json").read_text())["plan"]["by"] == "adapter"
    assert "by the adapter, while it was trained" in (tmp_path / "out" / "README.md").read_text()


def test_what_atp_decided_is_exported(
    assets: Path, tmp_path: Path, run_script: Script, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "base")
    config = AtpConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", base_model_name_or_path=str(assets / "base"),
        atp_layers=2, atp_sizes={"ffn": 64, "kv_groups": 2}, atp_kept={"ffn": 40, "kv_groups": 1},
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    equip(wrapped)
    randomize(wrapped, 0.05, 1)
    groups, channels = ((1,), (0,)), PLAN.ffn or ()
    for index in range(2):
        layer = wrapped.get_submodule(f"base_model.model.model.layers.{index}")
        for names, kept in (("q_proj k_proj v_proj", groups[index]), ("gate_proj up_proj", channels[index])):
            for name in names.split():
                mask = (layer.self_attn if "q_proj" in names else layer.mlp).get_submodule(name).lora_kept["default"]
                mask.zero_()[list(kept)] = 1
    wrapped.save_pretrained(tmp_path / "atp")
    assert run_script("export_pruned", "--adapter", tmp_path / "atp", "--output", tmp_path / "out") == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert PruningPlan.load(tmp_path / "out") == PruningPlan(ffn=channels, kv_groups=groups)
    assert exported.config.num_key_value_heads == 1 and exported.config.intermediate_size == 40
    assert torch.allclose(logits(exported), logits(wrapped), atol=1e-4)
    cut = json.loads((tmp_path / "out" / "pruning_report.json").read_text())["plan"]["length_cut_off"]
    assert cut > 0 and f"weights of the adapter of length {cut:.3g}" in capsys.readouterr().out


NO_CRITERION = "--criterion: write by which score the lowest go"
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing asked for": ((), "nothing says what goes"),
    "no criterion": (("--hidden", "0.25"), NO_CRITERION),
    "no sizes": (("--criterion", "magnitude", "--plan", "plan"), "there are no sizes that it would choose for"),
    "no rows": (("--ffn", "32", "--criterion", "gradient"), "--data: gradient is measured on rows"),
    "rows for nothing": (("--ffn", "32", "--criterion", "magnitude", "--data", "x"), "nothing is measured on it"),
    "plan and sizes": (("--ffn", "32", "--criterion", "magnitude", "--plan", "plan"), "--plan says what is kept"),
    "no plan": (("--plan", "nowhere"), "no pruning plan can be read from nowhere"),
    "a plan of nothing": (("--plan", "empty"), "--plan: empty keeps everything; write at least one axis"),
    "answers of nothing": (("--plan", "plan", "--answer_column", "answer"), "which is not given"),
    "a strange share": (("--hidden", "1.5"), "expected how many stay, such as 384, or the share that goes"),
    "a share of nothing": (("--hidden", "0.0"), "expected how many stay"),
    # What follows needs the config, and stops before the weights, which are not there.
    "too many": (("--ffn", "65", "--criterion", "magnitude"), "the model has 64 feed-forward channels"),
    "all layers": (("--drop_layers", "2", "--criterion", "magnitude"), "at least one must stay"),
    "as it is": (("--ffn", "64", "--criterion", "magnitude"), "nothing would be pruned"),
    "no stock size": (("--plan", "uneven"), "ffn keeps 3 in one layer and 4 in another"),
    "another model's": (("--plan", "large"), "hidden keeps index 99, but the model has 32"),
    "untied already": (("--plan", "plan", "--keep_tied"), "are two matrices already: leave out keep_tied"),
    "no data": (("--ffn", "32", "--criterion", "gradient", "--data", "gone.jsonl"), "gone.jsonl"),
    "no answers": (("--plan", "plan", "--evaluate", "rows.jsonl", "--answer_column", "gold"), "no column 'gold'"),
    "no numbers": (
        ("--plan", "plan", "--evaluate", "rows.jsonl", "--answer_column", "prompt"),
        "row 0: prompt is 'no', which ends in no number",
    ),
}


@pytest.fixture
def without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the config and tokenizer of a model, plans and rows: whoever loads the model fails."""
    save_model(tmp_path / "model", family="llama")
    (tmp_path / "model" / "model.safetensors").unlink()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    for name, plan in {
        "plan": PLAN,
        "empty": PruningPlan(),
        "uneven": PruningPlan(ffn=((0, 1, 2), (0, 1, 2, 3))), "large": PruningPlan(hidden=(0, 99)),
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        plan.save(tmp_path / name)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "no", "completion": "number"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_cannot_work_is_refused_before_the_weights_are_read(
    words: tuple[str, ...],
    message: str,
    without_weights: Path,
    run_script: Script,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(path.name for path in without_weights.iterdir())
    assert run_script("export_pruned", "--model", "model", "--output", "out", "--use_cpu", *words) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in without_weights.iterdir()) == before


def test_a_family_that_cannot_be_pruned(
    without_weights: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    GPT2Config(n_layer=2, n_embd=32, n_head=4).save_pretrained(without_weights / "model")
    words = ("--model", "model", "--output", "out", "--drop_layers", "1", "--criterion", "magnitude")
    assert run_script("export_pruned", *words) == 2
    err = capsys.readouterr().err
    assert "gpt2" in err and "LayerNorm" in err and "qwen3" in err


@pytest.mark.parametrize("words", [["--hidden", "0.25", "--criterion", "magnitude"], ["--drop_layers", "1"]])
def test_an_adapter_that_has_learnt_what_goes_takes_no_sizes(
    words: list[str], tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str], assets: Path
) -> None:
    (tmp_path / "pat").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "pat" / name).write_bytes((assets / "adapter" / name).read_bytes())
    config = json.loads((tmp_path / "pat" / "adapter_config.json").read_text())
    (tmp_path / "pat" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "ALIGNKIT_PAT"}))
    assert run_script("export_pruned", "--adapter", tmp_path / "pat", "--output", tmp_path / "out", *words) == 2
    assert "has learnt what goes" in capsys.readouterr().err


def test_a_lora_adapter_alone_prunes_nothing(
    assets: Path, tmp_path: Path, run_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script("export_pruned", "--adapter", assets / "adapter", "--output", tmp_path / "out") == 2
    assert "to merge the adapter alone, write alignkit merge" in capsys.readouterr().err


def test_a_model_that_differs_is_not_written(
    assets: Path,
    tmp_path: Path,
    run_script: Script,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def worse(directory: Path, texts: Any, folder: Path) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.01)
        model.save_pretrained(directory)
        return look(str(directory), texts, str(folder / "logits.safetensors"))

    monkeypatch.setattr(verify, "_ask", worse)
    words = ("--model", assets / "base", "--output", tmp_path / "out", "--ffn", "32", "--criterion", "magnitude")
    assert run_script("export_pruned", *words) == 2
    assert "is not the masked model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def sized(**sizes: Any) -> LlamaConfig:
    given = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaConfig(**(given | {"num_hidden_layers": 6} | sizes))


@pytest.mark.parametrize(
    ("config", "asked", "kept", "lines"),
    [
        (sized(), {"hidden": Fraction("0.25"), "ffn": Fraction("0.25")}, (384, 1032, None), 0),
        (sized(), {"hidden": Fraction("0.3")}, (384, None, None), 1),
        (sized(intermediate_size=11008), {"ffn": Fraction("0.25")}, (None, 8320, None), 1),
        (sized(), {"kv_groups": Fraction("0.3")}, (None, None, 3), 1),
        (sized(), {"hidden": 333, "ffn": 1001, "kv_groups": 1}, (333, 1001, 1), 0),
        (sized(), {"hidden": Fraction("0.01"), "ffn": 32}, (None, 32, None), 1),
    ],
)
def test_shares_are_rounded_to_the_next_good_size(
    config: LlamaConfig, asked: dict[str, Any], kept: tuple[int | None, ...], lines: int
) -> None:
    found, said = kept_sizes(config, asked, 0)
    assert (found.hidden, found.ffn, found.kv_groups) == kept and len(said) == lines


def test_what_would_leave_nothing_is_said_at_once() -> None:
    with pytest.raises(ModelError, match=r"(?s)--hidden 513.*--ffn 2000.*--drop_layers 6"):
        kept_sizes(sized(), {"hidden": 513, "ffn": 2000}, 6)


def test_the_kinds_that_say_what_goes_are_those_there_are() -> None:
    from alignkit.models import _atp_layers, _pat_layers
    from alignkit.pruning.importance import CRITERIA

    assert {layers.CONFIG.kind for layers in (_atp_layers, _pat_layers)} == {
        SPARSE_PREFIX + kind for kind in SPARSE_KINDS
    }
    assert all(f"{criterion}" in command_line().format_help() for criterion in CRITERIA)
