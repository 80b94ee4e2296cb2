"""Write the tables in README.md and docs/ that repeat what the code says: methods, gradient rules, options, keys.

    python scripts/docs.py            regenerate (make docs); a method or gradient rule without a page gets one
    python scripts/docs.py --check    change nothing, list what is out of date and exit with status 1

A table stands between ``<!-- begin generated: NAME ARGUMENT -->`` and ``<!-- end generated -->``.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from alignkit.config.compatibility import REFUSALS
from alignkit.config.keys import Key, base_keys, method_keys, methods_with, program_methods, rule_keys
from alignkit.config.refusals import IgnoredKeys, Refusal
from alignkit.config.values import bounds, show, type_name
from alignkit.errors import AlignkitError
from alignkit.objectives._dpo_family import ScoredOptions
from alignkit.parametrizations.peft import KINDS as PEFT_KINDS
from alignkit.parametrizations.peft import REFUSED, UNMERGEABLE
from alignkit.parts.catalogue import KINDS
from alignkit.parts.data_format import format_names, load_format
from alignkit.parts.evaluation import evaluation_names, load_evaluation
from alignkit.parts.method import load_method, method_names
from alignkit.parts.parametrization import load_parametrization, parametrization_names
from alignkit.parts.reward import load_reward, reward_names
from alignkit.parts.rule import load_rule, rule_names
from alignkit.parts.shape import shapes_by_program
from alignkit.programs.entry import run_program
from alignkit.shipped import recipe_names, recipe_path

REPOSITORY = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?P<begin><!-- begin generated: (?P<name>[\w-]+)(?: (?P<argument>\w+))? -->\n).*?(?P<end><!-- end generated -->)",
    re.S,
)
METHOD_PAGE = """\
# {name}

<!-- begin generated: method-head {name} -->
<!-- end generated -->

## Options

<!-- begin generated: method-options {name} -->
<!-- end generated -->

## Metrics

<!-- begin generated: method-metrics {name} -->
<!-- end generated -->

## Equation and provenance

<!-- begin generated: method-docstring {name} -->
<!-- end generated -->
"""
RULE_PAGE = METHOD_PAGE.replace("generated: method-", "generated: rule-")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def methods_table(prefix: str) -> str:
    """All methods: what each does, its paper, how sure we are of it."""
    rows = []
    for method in map(load_method, method_names()):
        page, paper = (
            f"[`{method.name}`]({prefix}methods/{method.name}.md)",
            f"[{method.paper.title}]({method.paper.url})",
        )
        rows.append([page, method.summary, paper, method.fidelity])
    return table(["method", "what it does", "paper", "fidelity"], rows)


def methods_list(prefix: str) -> str:
    """The names of all methods, by program."""
    lines = []
    for program, shape in shapes_by_program().items():
        links = ", ".join(f"[`{name}`]({prefix}methods/{name}.md)" for name in program_methods(program))
        lines.append(f"- **{program}**. {shape.summary} {links}\n")
    return "".join(lines)


def parametrizations_table() -> str:
    """All parametrisations, and the keys of each."""
    rows = [
        [f"`{record.name}`", record.summary, " ".join(f"`{field.name}`" for field in fields(record.options))]
        for record in map(load_parametrization, parametrization_names())
    ]
    return table(["parametrization", "what trains", "its keys"], rows)


def parametrization_metrics() -> str:
    """What parametrisations log beside what every run does."""
    records = map(load_parametrization, parametrization_names())
    rows = [[f"`{record.name}`", f"`{key}`", what] for record in records for key, what in record.metrics.items()]
    return table(["parametrization", "logged", "what it is"], rows)


def peft_kinds() -> str:
    """The kinds of PEFT's adapters: those that work, and why others do not."""
    taken = [[f"`{kind}`", "no" if kind in UNMERGEABLE else "yes"] for kind in PEFT_KINDS]
    refused = [[" ".join(f"`{kind}`" for kind in kinds), why] for why, _, kinds in REFUSED.values()]
    return f"{table(['peft_type', 'merges'], taken)}\n{table(['refused', 'why'], refused)}"


def method_head(name: str) -> str:
    """The opening paragraph of a method's page."""
    method = load_method(name)
    rows = shapes_by_program()[method.program].rows_of(method)
    return (
        f"{method.summary}\n\n"
        f"- Paper: [{method.paper.title}]({method.paper.url})\n"
        f"- Fidelity: {method.fidelity}\n"
        f"- Needs: {', '.join([*sorted(method.needs(method.options())), rows])}\n"
        f"- Program: `trainers/{method.program}.py`\n"
    )


def rules_table() -> str:
    """All gradient rules: what each does, its paper, how sure we are of it."""
    rows = []
    for rule in map(load_rule, rule_names()):
        paper = f"[{rule.paper.title}]({rule.paper.url})"
        rows.append([f"[`{rule.name}`](../gradients/{rule.name}.md)", rule.summary, paper, rule.fidelity])
    return table(["rule", "what it does", "paper", "fidelity"], rows)


def rule_head(name: str) -> str:
    """The opening paragraph of a gradient rule's page."""
    rule = load_rule(name)
    evaluations = "two a micro-batch" if rule.displacement else "one a micro-batch, as without a rule"
    return (
        f"{rule.summary}\n\n"
        f"- Paper: [{rule.paper.title}]({rule.paper.url})\n"
        f"- Fidelity: {rule.fidelity}\n"
        f"- Forward and backward passes: {evaluations}\n"
        "- How rules work, and where: [gradient rules](../concepts/gradient_rules.md)\n"
    )


def rule_docstring(name: str) -> str:
    """Equation, symbols, deviations and fidelity, as the rule states them."""
    rule = load_rule(name)
    return f"```text\n{inspect.cleandoc((rule.edit or rule.decay).__doc__ or '')}\n```\n"


def keys_table(keys: Iterable[Key]) -> str:
    """Keys with type or range, default, meaning and the source of the default."""
    return table(["key", "value", "default", "meaning", "source"], map(_key_row, keys))


def method_metrics(name: str) -> str:
    """What a method logs."""
    return metrics_table(load_method(name).metrics.items())


def metrics_table(metrics: Iterable[tuple[str, str]]) -> str:
    """Metric keys with their meaning."""
    return table(["metric", "meaning"], ([f"`{key}`", meaning] for key, meaning in metrics))


def probe_metrics() -> str:
    """What the probe callback logs."""
    from alignkit.shapes._probe import METRICS

    return metrics_table(METRICS.items())


def method_docstring(name: str) -> str:
    """Equation, symbols, deviations and fidelity, as the loss states them."""
    source = (REPOSITORY / "alignkit" / "losses" / f"{name}.py").read_text()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    text = inspect.cleandoc(ast.get_docstring(functions[f"{name}_loss"]) or "")
    return f"```text\n{text.partition('Args:')[0].strip()}\n```\n"


def all_keys() -> str:
    """The keys every method has, by section."""
    keys = base_keys("preference").values()
    groups = itertools.groupby(keys, key=lambda key: key.section)
    return "\n".join(f"### {section}\n\n{keys_table(group)}" for section, group in groups)


def own_keys(program: str) -> str:
    """The keys of a program that preference runs do not have, or have with another default or meaning."""
    common = base_keys("preference")
    own = [key for name, key in base_keys(program).items() if name not in common or key.info != common[name].info]
    return keys_table(key for key in own if key.name not in ("method", "gradient_rule"))


def evaluations() -> str:
    """What ``alignkit evaluate --metrics`` takes."""
    found = map(load_evaluation, evaluation_names())
    return table(["name", "what it says"], ([f"`{evaluation.name}`", evaluation.summary] for evaluation in found))


def rewards() -> str:
    """Every reward: what it says of itself, where it is from, the columns it reads, and its options."""
    blocks = []
    for reward in map(load_reward, reward_names()):
        types = get_type_hints(reward)
        options = [Key(f.name, types[f.name], f.metadata["option"], reward.name, f) for f in fields(reward)]
        counted = " Reads `completion_ids`." if reward.counts_tokens else ""
        blocks.append(
            f"### {reward.name}\n\n{reward.summary} Weight {reward.weight:g} unless a run names one.{counted} "
            f"Fidelity: {reward.fidelity}.\n\n```text\n{inspect.cleandoc(reward.__doc__ or '')}\n```\n\n"
            + (keys_table(options) if options else "No options.\n")
        )
    return "\n".join(blocks)


def supervised_metrics() -> str:
    """What the supervised bridge logs."""
    from alignkit.shapes._tokens import METRICS

    return metrics_table(METRICS.items())


def parts() -> str:
    """Everything a run can be made of, by kind, and the folder that a new one is added to."""
    return "\n".join(
        f"### {kind.title[0].upper()}{kind.title[1:]}\n\n"
        f"One file {'a family' if kind.in_families else 'each'} in `{kind.folder}`.\n\n"
        + table(["name", "what it is"], ([f"`{name}`", summary] for name, summary in kind.summaries().items()))
        for kind in KINDS
    )


def data_formats() -> str:
    """How rows may be written beside our own forms, and what they become."""
    formats = [load_format(name) for name in format_names()]
    read_as = lambda form: "; ".join(", ".join(f"`{column}`" for column in given) for given in form.gives)  # noqa: E731
    return table(
        ["format", "how rows are written", "what they become"],
        ([f"`{form.name}`", form.summary, read_as(form)] for form in formats),
    )


def recipes() -> str:
    """Shipped recipes with the first line of their header."""
    headers = {name: recipe_path(name).read_text().partition("\n")[0] for name in recipe_names()}
    return table(["recipe", "what it is"], ([f"`{name}`", header.strip("#: ")] for name, header in headers.items()))


def results() -> str:
    """Pages of measured results."""
    found = sorted((REPOSITORY / "docs" / "results").glob("*.md"))
    titles = {page.name: page.read_text().partition("\n")[0].lstrip("# ") for page in found}
    return "".join(f"- [{title}](results/{name})\n" for name, title in titles.items())


def refused_combinations() -> str:
    """Refused combinations and keys without effect."""
    clashes = [refusal for refusal in REFUSALS if not isinstance(refusal, IgnoredKeys)]
    ignored = [refusal for refusal in REFUSALS if isinstance(refusal, IgnoredKeys)]
    return (
        "## Cannot work\n\n"
        + table(["combination", "keys", "why", "instead"], map(_refusal_row, clashes))
        + "\n## Would have no effect\n\nOnly refused when you set the key yourself.\n\n"
        + table(["combination", "keys", "why", "instead"], map(_refusal_row, ignored))
    )


def compositions() -> str:
    """Methods by gradient rules as the tests run them, and what the config refuses."""
    # The tests are in every checkout, which is where pages are written, but not on the path of a script.
    sys.path.insert(0, str(REPOSITORY))
    from tests.gradients.compositions import matrix, refusals

    return table(*matrix()) + "\n" + "".join(f"- {line}\n" for line in refusals())


def loss_table() -> str:
    """Losses by what the tests train them on and with."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.shapes.loss_table import table as cells

    return table(*cells())


def tutorials() -> str:
    """The first commands of other toolkits' tutorials, and what each is here."""
    sys.path.insert(0, str(REPOSITORY))
    from scripts.tutorials import TUTORIALS

    rows = []
    for one in TUTORIALS:
        said = [
            f"{key}: {one.config[key]}" for key in ("stage", "rl", "pref_loss", "quantization_bit") if key in one.config
        ]
        rows.append([one.tool, f"`{one.theirs}`" + (f" ({', '.join(said)})" if said else ""), f"`{one.shown}`"])
    return table(["", "there", "here"], rows)


def when_table() -> str:
    """All methods by the rows they take, and when to take them."""
    rows = []
    for program, shape in shapes_by_program().items():
        for method in (load_method(name) for name in program_methods(program)):
            page = f"[`{method.name}`](../methods/{method.name}.md)"
            rows.append([page, f"`{program}`", shape.rows_of(method), method.when])
    return table(["method", "program", "rows", "when"], rows)


def modifiers() -> str:
    """Options that change a loss of pairs, each with the methods that have it."""
    options = {field.name: field.metadata["option"].help for field in fields(ScoredOptions) if field.name != "beta"}
    del options["f_alpha_divergence_coef"]  # It is of no use but with f_divergence_type.
    options = {"label_smoothing": "Share of the labels that is taken for flipped.", **options}
    rows = []
    for key, what in options.items():
        names = [f"[`{name}`](../methods/{name}.md)" for name in methods_with("preference", key)]
        rows.append([f"`{key}`", what, " ".join(names)])
    return table(["key", "what it does", "losses that have it"], rows)


def wrong_inputs() -> str:
    """How many wrong inputs the tests try, by kind."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.wrong_inputs import counts

    found = counts()
    rows = [[kind, str(count), f"{count} of {count}"] for kind, count in found.items()]
    total = str(sum(found.values()))
    return table(["kind of input", "tried", "answered by one message"], [*rows, ["all", total, f"{total} of {total}"]])


def hostile_files() -> str:
    """How many hostile files the tests try, by kind."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.chaos.hostile import KINDS
    from tests.chaos.hostile_runs import CORPUS

    rows = []
    for kind, meaning in KINDS.items():
        found = [case for case in CORPUS if case.kind == kind]
        works = sum(case.says is None for case in found)
        rows.append([meaning, str(len(found)), str(len(found) - works), str(works)])
    rows.append(["all", *(str(sum(int(row[column]) for row in rows)) for column in (1, 2, 3))])
    return table(["kind of file", "tried", "refused by one message", "used, as nothing but its look is hostile"], rows)


GENERATORS: dict[str, Callable[..., str]] = {
    "compositions": compositions,
    "data-formats": data_formats,
    "evaluations": evaluations,
    "hostile-files": hostile_files,
    "keys": all_keys,
    "loss-table": loss_table,
    "modifiers": modifiers,
    "method-docstring": method_docstring,
    "method-head": method_head,
    "method-metrics": method_metrics,
    "method-options": lambda name: keys_table(method_keys(name).values()),
    "own-keys": own_keys,
    "parts": parts,
    "parametrizations": parametrizations_table,
    "parametrization_metrics": parametrization_metrics,
    "peft-kinds": peft_kinds,
    "probe-metrics": probe_metrics,
    "recipes": recipes,
    "results": results,
    "rewards": rewards,
    "rule-docstring": rule_docstring,
    "rule-head": rule_head,
    "rule-metrics": lambda name: (
        metrics_table(load_rule(name).metrics.items()) if load_rule(name).metrics else "None.\n"
    ),
    "rule-options": lambda name: keys_table(rule_keys(name).values()),
    "refusals": refused_combinations,
    "rules-table": rules_table,
    "supervised-metrics": supervised_metrics,
    "tutorials": tutorials,
    "when-table": when_table,
    "wrong-inputs": wrong_inputs,
}


OF_ANY_PAGE: dict[str, Callable[[str], str]] = {"methods-list": methods_list, "methods-table": methods_table}
"""Blocks with links to pages, which begin elsewhere in README.md."""


def regenerate(path: Path) -> str:
    """The text of a page with its generated blocks brought up to date."""
    prefix = "docs/" if path.parent == REPOSITORY else ""

    def fill(match: re.Match[str]) -> str:
        name, argument = match["name"], match["argument"]
        if name in OF_ANY_PAGE:
            body = OF_ANY_PAGE[name](prefix)
        elif name in GENERATORS:
            body = GENERATORS[name](*([argument] if argument else []))
        else:
            raise AlignkitError(f"{path.name}: no generator is called {name!r}; there are {', '.join(GENERATORS)}")
        return f"{match['begin']}{body}{match['end']}"

    return BLOCK.sub(fill, path.read_text())


def pages() -> list[Path]:
    """README.md and everything under docs/."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def missing_pages() -> dict[Path, str]:
    """Pages that methods and gradient rules have not got yet, and what they begin as."""
    wanted = {REPOSITORY / "docs" / "methods" / f"{name}.md": METHOD_PAGE for name in method_names()}
    wanted |= {REPOSITORY / "docs" / "gradients" / f"{name}.md": RULE_PAGE for name in rule_names()}
    return {page: template for page, template in wanted.items() if not page.exists()}


def main() -> int:
    """Regenerate, or with ``--check`` only compare."""
    parser = argparse.ArgumentParser(description="Regenerate the tables in README.md and docs/.")
    parser.add_argument("--check", action="store_true", help="change nothing; list what is out of date")
    check = parser.parse_args().check
    stale = [f"{page.relative_to(REPOSITORY)} is missing" for page in missing_pages()]
    if not check:
        for page, template in missing_pages().items():
            page.write_text(template.format(name=page.stem))
    for page in pages():
        text = regenerate(page)
        if text != page.read_text():
            stale.append(f"{page.relative_to(REPOSITORY)} is out of date")
            if not check:
                page.write_text(text)
    if check:
        print("\n".join([*stale, "run: make docs"]) if stale else "everything generated is up to date")
        return 1 if stale else 0
    print(f"{len(stale)} pages written")
    return 0


def _key_row(key: Key) -> list[str]:
    default = "required" if key.required else f"`{show(key.default)}`"
    return [f"`{key.name}`", _admissible(key), default, key.info.help, key.info.source]


def _admissible(key: Key) -> str:
    """Choices, or type and range; a type too long for a table is left to the key's help."""
    if key.info.choices:
        return " ".join(f"`{show(choice)}`" for choice in key.info.choices)
    kind, null, _ = type_name(key.type).partition(" or null")
    return f"{kind} {bounds(key.info)}".strip() + null if len(kind) <= 60 else "text, mapping, or list of these"


def _refusal_row(refusal: Refusal) -> list[str]:
    keys = [*refusal.keys, *(refusal.under if isinstance(refusal, IgnoredKeys) else ())]
    return [refusal.title, " ".join(f"`{key}`" for key in dict.fromkeys(keys)), refusal.why, refusal.fix]


if __name__ == "__main__":
    run_program(main)
