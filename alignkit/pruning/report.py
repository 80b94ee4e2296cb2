"""What is written beside a pruned model: ``pruning_report.json``, and a card that a stranger can use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from alignkit.environment import environment
from alignkit.models.card_file import read_card
from alignkit.models.export import method_tags
from alignkit.models.files import CARD_OF_THE_ADAPTER
from alignkit.models.loading import DTYPES
from alignkit.places import is_local
from alignkit.plain_text import markdown
from alignkit.pruning.picture import PICTURE
from alignkit.pruning.plan import PLAN_FILE
from alignkit.storage.durability import write_whole

if TYPE_CHECKING:
    from alignkit.pruning.export import ExportReport, Size

REPORT_FILE = "pruning_report.json"
FORMAT = 1
NOT_CHECKED = ("conversion to GGUF and what llama.cpp makes of it", "vLLM")
"""What the verification of an export leaves out, for the reader to try."""
_AXES = {
    "hidden": "hidden channels",
    "ffn": "feed-forward channels a layer",
    "kv_groups": "KV groups a layer",
    "heads": "query heads a layer",
    "layers": "layers",
}


@dataclass(frozen=True)
class Origin:
    """What was pruned, and how it was decided what goes.

    Attributes:
        model: Folder or Hub id of the dense model.
        revision: Branch, tag or commit of a Hub model, or None.
        adapter: Folder of the adapter that was merged, or None.
        adapter_kind: PEFT's or our name of its kind, or None.
        choice: How the plan came about: ``by`` (``plan``, ``adapter`` or the criterion), with what it was computed on.
        card: Card to inherit licence, language and data sets from, or None.
    """

    model: str
    revision: str | None
    adapter: Path | None
    adapter_kind: str | None
    choice: Mapping[str, Any]
    card: Path | None

    @property
    def model_name(self) -> str:
        """What the model is called where paths of this machine say nothing."""
        return Path(self.model).name if is_local(self.model) else self.model


def cache_bytes(size: Size, dtype: str) -> int:
    """Bytes of the KV cache for each token, every layer looking at all of them.

    Args:
        size: Of the model.
        dtype: Type of the cache.
    """
    axes = size.axes
    return 2 * axes.layers * axes.kv_groups * axes.head_dim * DTYPES[dtype].itemsize


def write_report(
    directory: Path, report: ExportReport, origin: Origin, evaluation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Write :data:`REPORT_FILE`; returns its content. Paths of this machine are not in it.

    Args:
        directory: Folder of the exported model.
        report: Of the export.
        origin: What was pruned.
        evaluation: Figures before and after with what they were computed on, or None.
    """
    found = report.to_json()
    sizes = {
        when: {**found[key], "kv_cache_bytes_per_token": cache_bytes(getattr(report, key), report.dtype)}
        for when, key in (("before", "dense"), ("after", "pruned"))
    }
    record = {
        "alignkit_pruning": FORMAT,
        "plan": {"sha256": report.plan, "file": PLAN_FILE, **origin.choice},
        "made_of": {
            "model": origin.model_name,
            "revision": origin.revision,
            "adapter": None if origin.adapter is None else origin.adapter.name,
            "adapter_kind": origin.adapter_kind,
        },
        "sizes": sizes,
        **{key: found[key] for key in ("model_type", "dtype", "is_tied", "exact", "verification", "notes")},
        "not_checked": list(NOT_CHECKED),
        "evaluation": evaluation,
        "versions": environment()["versions"],
    }
    write_whole(directory / REPORT_FILE, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return record


def write_card(directory: Path, record: Mapping[str, Any], origin: Origin) -> None:
    """Write the model card.

    Args:
        directory: Folder of the exported model.
        record: What :func:`write_report` returned.
        origin: What was pruned.
    """
    inherited = {} if origin.card is None else read_card(origin.card).data.to_dict()
    data = ModelCardData(
        base_model=None if is_local(origin.model) else origin.model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys(["alignkit", "pruned", *method_tags(inherited.get("tags") or [])])],
        **{key: inherited[key] for key in ("license", "language", "datasets") if key in inherited},
    )
    sections = [_opening(directory.name, record), _sizes(record), _checks(record), _evaluation(record)]
    sections += [_loading(directory.name, record)]
    body = "\n\n".join(section for section in sections if section)
    (directory / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{body}\n", encoding="utf-8")
    if origin.adapter is not None and origin.card is not None:
        shutil.copyfile(origin.card, directory / CARD_OF_THE_ADAPTER)


def _opening(name: str, record: Mapping[str, Any]) -> str:
    made, plan = record["made_of"], record["plan"]
    merged = "" if made["adapter"] is None else f", with a {made['adapter_kind']} adapter merged into its weights"
    ways = {
        "plan": "by a plan that was given",
        "adapter": "by the adapter, while it was trained",
    }
    how = ways.get(plan["by"])
    if how is None:
        rows = f" on {plan['rows']:,} rows ({plan['tokens']:,} tokens)" if plan.get("rows") else ""
        how = f"by importance ({plan['by']}){rows}; nothing was trained after that"
    return (
        f"# {markdown(name)}\n\n{markdown(made['model'])}{merged}, made smaller by structured pruning: whole channels, "
        f"heads or layers were taken out. It is a plain {record['model_type']} model ({record['dtype']}) and needs no "
        f"code of its own. What goes was decided {how}."
    )


def _sizes(record: Mapping[str, Any]) -> str:
    before, after = record["sizes"]["before"], record["sizes"]["after"]
    rows = [
        (name, before["axes"][axis], after["axes"][axis])
        for axis, name in _AXES.items()
        if before["axes"][axis] != after["axes"][axis]
    ]
    rows += [
        ("parameters", before["parameters"], after["parameters"]),
        ("bytes of weights", before["bytes"], after["bytes"]),
        ("bytes of KV cache a token", before["kv_cache_bytes_per_token"], after["kv_cache_bytes_per_token"]),
    ]
    table = "\n".join(f"| {name} | {old:,} | {new:,} | {new / old:.2f} |" for name, old, new in rows)
    shrinks = before["kv_cache_bytes_per_token"] != after["kv_cache_bytes_per_token"]
    cache = (
        "The KV cache is smaller with the KV groups and layers that went"
        if shrinks
        else "The KV cache stays as large as it was: it shrinks with KV groups and layers alone, and none went"
    )
    tied = "one matrix" if record["is_tied"] else "two matrices"
    return (
        f"| | before | after | ratio |\n|---|---|---|---|\n{table}\n\n![What is kept]({PICTURE})\n\n{cache}. Embedding "
        f"and head are {tied}. The indices that are kept are in {PLAN_FILE}, everything else about it in {REPORT_FILE}."
    )


def _checks(record: Mapping[str, Any]) -> str:
    exact, verified = record["exact"], record["verification"]
    return f"""## How it was verified

A fresh process loaded these files with plain transformers {verified["transformers"]} ({verified["model_class"]}): no
weight was missing, unexpected or of another shape. On {verified["positions"]} tokens its logits were compared with
those of the dense model in which the same parts are set to zero.

| against the masked dense model | largest difference of a logit |
|---|---|
| in float32, before rounding | {exact["max_abs"]:.2g} |
| these files ({record["dtype"]}), tolerance {verified["tolerance"]:g} | {verified["max_error"]:.2g} |
| a token read through the KV cache, against without | {verified["cache_error"]:.2g} |

That says the export lost nothing; how much the pruning itself costs is another question. Not checked on these files:
{", ".join(record["not_checked"])}."""


def _evaluation(record: Mapping[str, Any]) -> str:
    found = record["evaluation"]
    if found is None:
        return (
            "## What it costs\n\nNothing was evaluated: compare it with the dense model on your task before using it."
        )
    models = found["figures"]
    keys = list(next(iter(models.values())))
    names = {"nats_per_token": "nats a token", "exact_match": "exact match"}
    lines = ["| | " + " | ".join(names[key] for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, values in models.items():
        lines.append(f"| {name} | " + " | ".join(_figure(values[key]) for key in keys) + " |")
    table = "\n".join(lines)
    return (
        f"## What it costs\n\n{table}\n\nOn {found['rows']:,} rows; ± is 1.96 standard errors over rows. Likelihood "
        "comes back with little training, and answers that need several steps of reasoning do not: judge by your task."
    )


def _figure(value: Mapping[str, Any]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.4f}" + ("" if error is None else f" ± {1.96 * error:.4f}")


def _loading(name: str, record: Mapping[str, Any]) -> str:
    notes = "".join(f"\n- {markdown(note)}" for note in record["notes"])
    other = f"\n\nWhat to know:\n{notes}" if notes else ""
    return f"""## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
```{other}"""
