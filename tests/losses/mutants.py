"""Broken copies of a loss: one small edit each, of the kind a slip of the hand makes."""

from __future__ import annotations

import ast
import copy
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType

SWAPS = {
    "chosen": "rejected",
    "chosen_logratio": "rejected_logratio",
    "chosen_rewards": "rejected_rewards",
    "chosen_mean_logps": "rejected_mean_logps",
    "beta_pos": "beta_neg",
    "any": "all",
    "alpha": "beta",
    "samples": "negative",
    "logratio": "policy_logps",
}
SWAPS |= {right: left for left, right in SWAPS.items()}
DROPPED_CALLS = {"masked_fill", "clamp", "detach", "sigmoid", "log", "exp", "abs", "square", "sqrt", "flip"}


@dataclass(frozen=True)
class Mutant:
    """One edit of one module.

    Attributes:
        module: Dotted name of the module that is edited.
        description: Line, original and replacement.
        tree: The edited source.
    """

    module: str
    description: str
    tree: ast.Module


def source_tree(module: str) -> ast.Module:
    """The parsed source of a module, found without importing it."""
    spec = importlib.util.find_spec(module)
    return ast.parse(Path(spec.origin).read_text())


def mutants_of(module: str) -> Iterator[Mutant]:
    """Every edit of every expression in the function bodies of a module."""
    original = source_tree(module)
    for place, function in enumerate(original.body):
        if not isinstance(function, ast.FunctionDef):
            continue
        for index, node in enumerate(_expressions(function)):
            for replacement in _replacements(node):
                # Only the function is copied: of the rest of the module nothing changes.
                edited = copy.deepcopy(function)
                _Substitute(_expressions(edited)[index], replacement).visit(edited)
                ast.fix_missing_locations(edited)
                body = [*original.body[:place], edited, *original.body[place + 1 :]]
                description = f"line {node.lineno}: {ast.unparse(node)}  ->  {ast.unparse(replacement)}"
                yield Mutant(module, description, ast.Module(body, original.type_ignores))


def _expressions(function: ast.FunctionDef) -> list[ast.expr]:
    return [n for statement in function.body for n in ast.walk(statement) if isinstance(n, ast.expr)]


def _replacements(node: ast.expr) -> Iterator[ast.expr]:
    """What could have been written by mistake in place of ``node``."""
    match node:
        case ast.BinOp(left=left, op=ast.Sub() | ast.Add() as op, right=right):
            flipped = ast.Add() if isinstance(op, ast.Sub) else ast.Sub()
            yield ast.BinOp(left=left, op=flipped, right=right)
        case ast.BinOp(left=left, op=ast.Mult() | ast.BitAnd(), right=right):
            yield from (left, right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            yield left
            yield ast.BinOp(left=left, op=ast.Mult(), right=right)
        # A negated literal is an axis; `all(1)` for `all(-1)` on a matrix would be the same program.
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not(), operand=operand) if not isinstance(
            operand, ast.Constant
        ):
            yield operand
        case ast.Compare(left=left, ops=[ast.Gt()], comparators=right):
            yield ast.Compare(left=left, ops=[ast.Lt()], comparators=right)
            yield ast.Compare(left=left, ops=[ast.GtE()], comparators=right)
        case ast.Compare(left=left, ops=[ast.LtE()], comparators=right):
            yield ast.Compare(left=left, ops=[ast.Lt()], comparators=right)
            yield ast.Compare(left=left, ops=[ast.GtE()], comparators=right)
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=right):
            yield ast.Compare(left=left, ops=[ast.NotEq()], comparators=right)
        case ast.IfExp(body=body, orelse=orelse):
            yield from (body, orelse)
        case ast.Call(func=ast.Attribute(attr=name, value=value), args=args) if name in DROPPED_CALLS:
            yield args[0] if isinstance(value, ast.Name) and value.id in {"torch", "math"} else value
        case ast.Attribute(attr=name, value=value) if name in SWAPS:
            yield ast.Attribute(value=value, attr=SWAPS[name], ctx=ast.Load())
        case ast.Name(id=name, ctx=ast.Load()) if name in SWAPS:
            yield ast.Name(id=SWAPS[name], ctx=ast.Load())
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            yield ast.Constant(value=value + 1)


class _Substitute(ast.NodeTransformer):
    def __init__(self, target: ast.expr, replacement: ast.expr) -> None:
        self.target, self.replacement = target, copy.deepcopy(replacement)

    def visit(self, node: ast.AST) -> ast.AST:
        return self.replacement if node is self.target else self.generic_visit(node)


@contextmanager
def loaded(mutant: Mutant, entry: str) -> Iterator[ModuleType]:
    """The module ``entry``, executed afresh against the mutant; the real modules are back on leaving."""
    saved = {name: sys.modules[name] for name in {mutant.module, entry}}
    try:
        module = _execute(mutant.module, _compiled(mutant.module, mutant.tree))
        yield module if entry == mutant.module else _execute(entry, _code_of(entry))
    finally:
        sys.modules.update(saved)


@cache
def _code_of(module: str) -> CodeType:
    return _compiled(module, source_tree(module))


def _compiled(name: str, tree: ast.Module) -> CodeType:
    return compile(tree, f"<mutant of {name}>", "exec")


def _execute(name: str, code: CodeType) -> ModuleType:
    module = ModuleType(name)
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module
