"""The model card: what was trained, how, on what, with which result, and how to load it."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData

from alignkit.parts.method import Method, load_method
from alignkit.parts.parametrization import Parametrization, load_parametrization
from alignkit.parts.rule import GradientRule, load_rule
from alignkit.parts.shape import shapes_by_program
from alignkit.places import is_hub_id
from alignkit.plain_text import markdown, markdown_code
from alignkit.reports.card_online import drawn_text

_LENGTHS_SHOWN = {
    "prompt": "tokens a prompt",
    "completion": "tokens a completion",
    "row": "tokens a row",
    "trained": "trained tokens a row",
}
_CACHED_MODEL = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")


@dataclass(frozen=True, kw_only=True)
class CardContent:
    """Everything a card says.

    Attributes:
        name: Title.
        method: The method trained with.
        gradient_rule: What was done to its gradient; None is nothing.
        base_model: Directory or Hub id the run started from, as the user wrote it.
        location: Where the result is loaded from: the run directory, or the Hub id it is published under.
        parametrization: What of it was trained: an adapter, or the whole model.
        config: Effective options, ``{key: {"value": ..., "source": ...}}``.
        datasets: Paths and Hub ids of the training data.
        data: What there is to say about the rows, label to value.
        results: Columns of the result table, such as ``before`` and ``after``, each metric to value.
        warnings: Of token rewards and of the health monitor, a line each.
        figures: Files beside the card.
        versions: Distribution to version.
    """

    name: str
    method: Method
    base_model: str
    location: str
    parametrization: Parametrization
    config: Mapping[str, Mapping[str, Any]]
    gradient_rule: GradientRule | None = None
    datasets: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    figures: Sequence[str] = ("plot.png",)
    versions: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def is_published(self) -> bool:
        """Whether the card is read elsewhere than on this machine."""
        return hub_id(self.location) is not None


def hub_id(name: str) -> str | None:
    """The Hub id that a model or data set name stands for; None for anything local.

    A path into the Hub's download cache stands for the repository it was downloaded from.

    Args:
        name: What the user wrote.
    """
    cached = _CACHED_MODEL.search(Path(name).as_posix() + "/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if Path(name).exists() or PurePosixPath(name).suffix in (".jsonl", ".json", ".csv", ".parquet"):
        return None
    return name if is_hub_id(name) else None


def content_of_run(sections: Mapping[str, Any], location: str) -> CardContent:
    """What the card of a run says, from its ``run.json`` alone, so that it can be written anew when it is published.

    Args:
        sections: ``config`` and, where recorded, ``environment``, ``data`` (the data report), ``results`` and
            ``results_before`` (metric to value on held-out rows after and before training), ``token_rewards`` (the
            report of each split) and ``health`` (the verdicts).
        location: The run directory, or the Hub id it is published under.
    """
    config = sections["config"]
    base_model, data = config["model"]["value"], config["data"]["value"]
    sources = [data] if isinstance(data, str) else [item if isinstance(item, str) else item["path"] for item in data]
    columns = {"before": sections.get("results_before"), "after": sections.get("results")}
    rule = config.get("gradient_rule", {}).get("value")
    return CardContent(
        name=_name(location),
        method=load_method(config["method"]["value"]),
        gradient_rule=None if rule is None else load_rule(rule),
        base_model=base_model,
        location=location,
        parametrization=load_parametrization(config["parametrization"]["value"]),
        config=config,
        datasets=sources,
        data=_row_counts(sections.get("data", {}).get("splits", [])),
        results={name: column for name, column in columns.items() if column},
        warnings=[*_reward_warnings(sections.get("token_rewards", {})), *map(_verdict, sections.get("health", []))],
        versions=sections.get("environment", {}).get("versions", {}),
    )


def _reward_warnings(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the token rewards of each split."""
    return [f"token rewards, {name}: {report['warning']}" for name, report in reports.items() if report["warning"]]


def _verdict(verdict: Mapping[str, Any]) -> str:
    return f"{verdict['title']} ({verdict['name']}, step {verdict['step']}): {verdict['evidence']}"


def _row_counts(splits: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The data report of each split in a few lines."""
    counts = {}
    for split in splits:
        counts[f"{split['name']}: rows used, of those read"] = f"{split['num_rows']} of {split['num_rows_in']}"
        counts[f"{split['name']}: rows cut at max_length"] = f"{split['num_truncated_rows']}"
        for what, lengths in split["lengths"].items():
            if what in _LENGTHS_SHOWN:
                found = f"{lengths['50 %']}, {lengths['max']}"
                counts[f"{split['name']}: {_LENGTHS_SHOWN[what]}, median and longest"] = found
    return counts


def render_card(content: CardContent) -> str:
    """The card as Markdown with a YAML header.

    Args:
        content: What to say.
    """
    sections = {
        "": _introduction(content),
        "Loading": _loading(content),
        "Method": _method_text(content.method),
        "Gradient rule": _rule_text(content.gradient_rule),
        "Completions and rewards": drawn_text(content.config),
        "Results": _results(content),
        "Training data": _training_data(content),
        "Options": _options(content),
        "Versions": _table(("package", "version"), [(k, v) for k, v in content.versions.items() if v is not None]),
        "Citation": f"```bibtex\n{_citations(content)}\n```",
    }
    body = [f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text]
    return f"---\n{_metadata(content).to_yaml()}\n---\n\n# {markdown(content.name)}\n\n" + "\n\n".join(body) + "\n"


def _metadata(content: CardContent) -> ModelCardData:
    """Only what the Hub can resolve; a local base model is named in the text and left out here."""
    datasets = [found for name in content.datasets if (found := hub_id(name)) is not None]
    return ModelCardData(
        base_model=hub_id(content.base_model),
        library_name="peft" if content.parametrization.has_adapter else "transformers",
        pipeline_tag=shapes_by_program()[content.method.program].pipeline,
        datasets=datasets or None,
        tags=[
            "alignkit",
            "trl",
            *(part.name for part in content.method.parts),
            *([content.gradient_rule.name] if content.gradient_rule else []),
            *([content.parametrization.name] if content.parametrization.has_adapter else []),
        ],
    )


def _introduction(content: CardContent) -> str:
    base = hub_id(content.base_model)
    named = (
        f"[{base}](https://huggingface.co/{base})"
        if base
        else f"the local model {markdown_code(_name(content.base_model))}"
    )
    product = content.parametrization.product.format_map({key: entry["value"] for key, entry in content.config.items()})
    what = f"{product} for {named}" if product else f"{named[0].upper()}{named[1:]}"
    method, verb = content.method, shapes_by_program()[content.method.program].verb
    papers = ", ".join(f"[{part.paper.title}]({part.paper.url})" for part in method.parts)
    text = f"{what}, {verb} `{method.name}` ({papers}) by alignkit. {method.summary}"
    if content.warnings:
        text += "\n\nThe run warned:\n\n" + "\n".join(f"- {markdown(w)}" for w in content.warnings)
    return text


def _loading(content: CardContent) -> str:
    location, shape = content.location, shapes_by_program()[content.method.program]
    load = f"{shape.auto_class}.from_pretrained"
    used = _REWARDS_READ if shape.config.gives_rewards else ()
    if not content.parametrization.has_adapter:
        imports = [f"from transformers import {shape.auto_class}, AutoTokenizer", ""]
        return _python(imports, [f"model = {load}({json.dumps(location)})"], location, used)
    base = hub_id(content.base_model)
    note = f"{content.parametrization.serving}\n\n" if content.parametrization.serving else ""
    if base is None:
        base = f"path/to/{_name(content.base_model)}" if content.is_published else content.base_model
        note += "The base model is a local one, and is needed beside the adapter.\n\n"
    quantization = content.config.get("quantization", {}).get("value", "none")
    if quantization != "none":
        note += f"The base was held in {quantization} while training; loaded in another precision it answers slightly "
        note += "differently.\n\n"
    imports = ["from peft import PeftModel", f"from transformers import {shape.auto_class}, AutoTokenizer", ""]
    head = ", num_labels=1" if shape.config.gives_rewards else ""
    model = [
        f"base = {load}({json.dumps(base)}{head})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(location)})",
    ]
    return note + _python(imports, model, location, used)


_REWARDS_READ = (
    "model.config.pad_token_id = tokenizer.pad_token_id",
    "# The reward of one text, prompt and answer as the tokenizer's chat template writes them:",
    'reward = model.eval()(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0]',
)


def _python(imports: Sequence[str], model: Sequence[str], location: str, used: Sequence[str]) -> str:
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(location)})"
    return "\n".join(["```python", *imports, *model, tokenizer, *used, "```"])


def _citations(content: CardContent) -> str:
    methods = [part.paper for part in content.method.parts]
    papers = [*methods, *([content.gradient_rule.paper] if content.gradient_rule else [])]
    return "\n\n".join(paper.citation.strip() for paper in papers)


def _results(content: CardContent) -> str:
    parts = []
    if content.results:
        metrics = dict.fromkeys(metric for column in content.results.values() for metric in column)
        rows = [(metric, *(column.get(metric) for column in content.results.values())) for metric in metrics]
        parts.append(_table(("metric", *content.results), rows))
    parts += [f"![{PurePosixPath(figure).stem} of the run]({figure})" for figure in content.figures]
    return "\n\n".join(parts)


def _training_data(content: CardContent) -> str:
    sources = [
        f"[{found}](https://huggingface.co/datasets/{found})"
        if (found := hub_id(name))
        else f"{markdown_code(_name(name))} (local)"
        for name in content.datasets
    ]
    listed = "\n".join(f"- {source}" for source in sources)
    return "\n\n".join(filter(None, [listed, _table(("", "rows and tokens"), list(content.data.items()))]))


def _options(content: CardContent) -> str:
    """What was chosen and the method's own options in sight; the other defaults folded away."""
    own = {f.name for f in fields(content.method.options)}
    own |= {f.name for f in fields(content.gradient_rule.options)} if content.gradient_rule else set()
    shown = {key: e for key, e in content.config.items() if key in own or e["source"] != "default"}
    header = ("option", "value", "source")
    folded = [(key, _value(e["value"]), "default") for key, e in content.config.items() if key not in shown]
    rows = [(key, _value(e["value"]), _source(e["source"])) for key, e in shown.items()]
    details = f"<details><summary>Options left at their defaults</summary>\n\n{_table(header, folded)}\n\n</details>"
    return _table(header, rows) + (f"\n\n{details}" if folded else "")


def _value(value: Any) -> str:
    return markdown_code(json.dumps(_without_folders(value), ensure_ascii=False))


def _source(source: str) -> str:
    """``c.yaml:12`` without the folders before it."""
    return markdown(_without_folders(source))


def _without_folders(value: Any) -> Any:
    """Absolute paths reduced to their last part: a card may be published, and says nothing about the machine."""
    if isinstance(value, str):
        return f".../{_name(value)}" if value.startswith(("/", "~")) else value
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(item) for item in value]
    return value


def _name(path: str) -> str:
    return PurePosixPath(path).name or path


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; empty without rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _method_text(method: Method) -> str:
    """The equation of a method's loss and how sure we are of it."""
    if method.mixed:
        return "\n\n".join([method.summary, *(f"### {part.name}\n\n{_method_text(part)}" for part in method.mixed)])
    equation = loss_equation(method.name)
    return (
        f"{equation}\n\nThe symbols are explained in the docstring of `alignkit.losses.{method.name}`.\n\n"
        f"Fidelity: {method.fidelity}."
    )


def _rule_text(rule: GradientRule | None) -> str:
    """What was done to the gradient and how sure we are of it; empty without a rule."""
    if rule is None:
        return ""
    paper = f"[{rule.paper.title}]({rule.paper.url})"
    return f"`{rule.name}` ({paper}): {rule.summary}\n\nFidelity: {rule.fidelity}."


def loss_equation(method: str) -> str:
    """The paragraph "Equation (...)::" of a loss docstring, as Markdown.

    Args:
        method: Method name; by convention its loss is ``alignkit.losses.<method>.<method>_loss``.
    """
    loss = vars(importlib.import_module(f"alignkit.losses.{method}"))[f"{method}_loss"]
    lines = inspect.cleandoc(loss.__doc__).split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("Equation"))
    head_end = next(i for i in range(start, len(lines)) if lines[i].endswith("::"))
    block = []
    for line in lines[head_end + 1 :]:
        if line and not line.startswith(" "):
            break
        block.append(line)
    return (
        " ".join(lines[start : head_end + 1]).removesuffix(":")
        + "\n\n```\n"
        + inspect.cleandoc("\n".join(block))
        + "\n```"
    )
