"""Changes the short way in one place at a time, and shows whom the random histories let live.

`python -m tests.launcher.plugins.mutants [WORD …]`: a line for each mutant (those whose place holds
a word), "survives" where nothing noticed it, and their number as the exit code. Minutes; by hand.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import logging
import signal
import sys
import types
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from lab.scheduler.engine_setup import EngineSetup
from tests.launcher.plugins.histories import Arrival, Event, histories, is_served, setups

MODULES = ("launcher.plugins.decode_batch", "launcher.plugins.decode_scheduler")
HISTORIES = 250
PATIENCE_S = 120
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.GtE: ast.Gt,
    ast.Gt: ast.GtE,
    ast.LtE: ast.Lt,
    ast.Lt: ast.LtE,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
}


class TookTooLong(Exception):
    pass


def main() -> int:
    logging.disable(logging.ERROR)
    twins = importlib.import_module("tests.launcher.plugins.twins")
    survivors = 0
    for name in MODULES:
        source = inspect.getsource(importlib.import_module(name))
        for place, tree in mutate(ast.parse(source)):
            if sys.argv[1:] and not any(word in place for word in sys.argv[1:]):
                continue
            noticed = try_mutant(twins, name, tree)
            survivors += not noticed
            print(f"{noticed or 'SURVIVES':28.28} {name.rpartition('.')[2]} {place}", flush=True)
    print(f"{survivors} survive")
    return min(survivors, 100)


def mutate(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """Every statement of a function left out, every operator turned into its neighbour."""
    notes = {id(part) for one in ast.walk(tree) for part in list_annotation(one)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in notes:
            continue
        for what, change in list_changes(node):
            changed = copy.deepcopy(tree)
            twin = next(one for at, one in enumerate(ast.walk(changed)) if at == number)
            place = f"{find_function(tree, node)}:{getattr(node, 'lineno', 0)} {what}"
            change(twin)
            yield place, ast.fix_missing_locations(changed)


def list_changes(node: ast.AST) -> Iterator[tuple[str, Any]]:
    if isinstance(node, ast.FunctionDef | ast.If | ast.For):
        for name in ("body", "orelse"):
            for at, statement in enumerate(getattr(node, name, ())):
                if not is_text(statement):
                    yield f"without {ast.unparse(statement)[:60]!r}", leave_out(name, at)
    yield from list_swaps(node)


def list_swaps(node: ast.AST) -> Iterator[tuple[str, Any]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        yield (
            f"turned {ast.unparse(node)[:60]!r}",
            lambda one: one.ops.__setitem__(0, _SWAPS[type(one.ops[0])]()),
        )
    if isinstance(node, ast.BoolOp | ast.BinOp | ast.AugAssign) and type(node.op) in _SWAPS:
        yield (
            f"turned {ast.unparse(node)[:60]!r}",
            lambda one: setattr(one, "op", _SWAPS[type(one.op)]()),
        )
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield f"one more than {node.value}", lambda one: setattr(one, "value", one.value + 1)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield f"turned {ast.unparse(node)[:60]!r}", lambda one: setattr(one, "op", ast.UAdd())


def leave_out(name: str, at: int) -> Any:
    def change(node: Any) -> None:
        getattr(node, name)[at] = ast.Pass()

    return change


def list_annotation(node: ast.AST) -> Iterator[ast.AST]:
    """Types, which nothing runs."""
    for name in ("annotation", "returns"):
        if (note := getattr(node, name, None)) is not None:
            yield from ast.walk(note)


def is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def find_function(tree: ast.Module, node: ast.AST) -> str:
    """The innermost one around it."""
    line = getattr(node, "lineno", 0)
    functions = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)]
    around = [one for one in functions if one.lineno <= line <= (one.end_lineno or 0)]
    return min(around, key=lambda one: (one.end_lineno or 0) - one.lineno).name if around else "-"


def try_mutant(twins: Any, name: str, tree: ast.Module) -> str:
    """What noticed it; empty: nothing did."""
    kept = {module: sys.modules[module] for module in MODULES}
    try:
        for module in MODULES:
            fresh = types.ModuleType(module)
            fresh.__file__ = kept[module].__file__
            sys.modules[module] = fresh
            code = tree if module == name else ast.parse(inspect.getsource(kept[module]))
            exec(compile(code, module, "exec"), fresh.__dict__)  # noqa: S102
        changed = sys.modules[MODULES[1]]
        changed.SLOW_STEP_S = 1e9  # type: ignore[attr-defined]
        twins.decode_scheduler, twins.build_scheduler = changed, changed.build_scheduler
        signal.signal(signal.SIGALRM, stop_waiting)
        signal.alarm(PATIENCE_S)
        play_all(twins)
    except (Exception, HypothesisException) as error:  # noqa: BLE001
        return type(error).__name__
    finally:
        signal.alarm(0)
        sys.modules.update(kept)
    return ""


def stop_waiting(*_: Any) -> None:
    raise TookTooLong


def play_all(twins: Any) -> None:
    pair = twins.Twins(EngineSetup(blocks=400))
    pair.play([Arrival(own_tokens=20 + n, most_tokens=50, ignores_eos=True) for n in range(12)])
    steps = pair.ours.scheduler.steps
    assert steps["short"] > 0.8 * (steps["short"] + steps["long"])
    ours, theirs = (sum(map(len, engine.messages)) for engine in (pair.ours, pair.theirs))
    assert ours < theirs / 2

    @settings(
        max_examples=HISTORIES,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(setups, histories, st.integers(0, 3))
    def play(setup: EngineSetup, history: list[Event], seed: int) -> None:
        twins.Twins(setup, seed).play([event for event in history if is_served(setup, event)])

    play()


if __name__ == "__main__":
    sys.exit(main())
