"""Write the tables in README.md and docs/ that repeat what the code says: methods, options, metrics, keys, rules.

    python scripts/docs.py            regenerate (make docs); a method without a page gets one
    python scripts/docs.py --check    change nothing, list what is out of date and exit with status 1

A table stands between ``<!-- begin generated: NAME ARGUMENT -->`` and ``<!-- end generated -->``.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from alignkit.config.compatibility import RULES
from alignkit.config.keys import Key, base_keys, method_keys
from alignkit.config.rules import IgnoredKeys, Rule
from alignkit.config.values import bounds, show, type_name
from alignkit.errors import AlignkitError
from alignkit.methods.method import load_method, method_names
from alignkit.programs import run_program
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


def method_head(name: str) -> str:
    """The opening paragraph of a method's page."""
    method = load_method(name)
    number = "any number of" if method.num_candidates is None else method.num_candidates
    return (
        f"{method.summary}\n\n"
        f"- Paper: [{method.paper.title}]({method.paper.url})\n"
        f"- Fidelity: {method.fidelity}\n"
        f"- Needs: {', '.join([*sorted(method.needs(method.options())), f'{number} completions a row'])}\n"
        f"- Program: `trainers/{method.program}.py`\n"
    )


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
    from alignkit.callbacks.probe import METRICS

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


def recipes() -> str:
    """Shipped recipes with the first line of their header."""
    headers = {name: recipe_path(name).read_text().partition("\n")[0] for name in recipe_names()}
    return table(["recipe", "what it is"], ([f"`{name}`", header.strip("#: ")] for name, header in headers.items()))


def results() -> str:
    """Pages of measured results."""
    found = sorted((REPOSITORY / "docs" / "results").glob("*.md"))
    titles = {page.name: page.read_text().partition("\n")[0].lstrip("# ") for page in found}
    return "".join(f"- [{title}](results/{name})\n" for name, title in titles.items())


def rules() -> str:
    """Refused combinations and keys without effect."""
    clashes = [rule for rule in RULES if not isinstance(rule, IgnoredKeys)]
    ignored = [rule for rule in RULES if isinstance(rule, IgnoredKeys)]
    return (
        "## Cannot work\n\n"
        + table(["combination", "keys", "why", "instead"], map(_rule_row, clashes))
        + "\n## Would have no effect\n\nOnly refused when you set the key yourself.\n\n"
        + table(["combination", "keys", "why", "instead"], map(_rule_row, ignored))
    )


GENERATORS: dict[str, Callable[..., str]] = {
    "keys": all_keys,
    "method-docstring": method_docstring,
    "method-head": method_head,
    "method-metrics": method_metrics,
    "method-options": lambda name: keys_table(method_keys(name).values()),
    "probe-metrics": probe_metrics,
    "recipes": recipes,
    "results": results,
    "rules": rules,
}


def regenerate(path: Path) -> str:
    """The text of a page with its generated blocks brought up to date."""
    prefix = "docs/" if path.parent == REPOSITORY else ""

    def fill(match: re.Match[str]) -> str:
        name, argument = match["name"], match["argument"]
        if name == "methods-table":
            body = methods_table(prefix)
        elif name in GENERATORS:
            body = GENERATORS[name](*([argument] if argument else []))
        else:
            raise AlignkitError(f"{path.name}: no generator is called {name!r}; there are {', '.join(GENERATORS)}")
        return f"{match['begin']}{body}{match['end']}"

    return BLOCK.sub(fill, path.read_text())


def pages() -> list[Path]:
    """README.md and everything under docs/."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def missing_pages() -> list[Path]:
    """Pages of methods that have none."""
    wanted = [REPOSITORY / "docs" / "methods" / f"{name}.md" for name in method_names()]
    return [page for page in wanted if not page.exists()]


def main() -> int:
    """Regenerate, or with ``--check`` only compare."""
    parser = argparse.ArgumentParser(description="Regenerate the tables in README.md and docs/.")
    parser.add_argument("--check", action="store_true", help="change nothing; list what is out of date")
    check = parser.parse_args().check
    stale = [f"{page.relative_to(REPOSITORY)} is missing" for page in missing_pages()]
    if not check:
        for page in missing_pages():
            page.write_text(METHOD_PAGE.format(name=page.stem))
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


def _rule_row(rule: Rule) -> list[str]:
    keys = [*rule.keys, *(rule.under if isinstance(rule, IgnoredKeys) else ())]
    return [rule.title, " ".join(f"`{key}`" for key in dict.fromkeys(keys)), rule.why, rule.fix]


if __name__ == "__main__":
    run_program(main)
