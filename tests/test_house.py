"""The source's own rules: a function is no longer than a screen, imports stand at the top, settings come in
groups, a file has an end."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import monosemy
from monosemy import config

SOURCE = Path(monosemy.__file__).parent
LONGEST_FUNCTION = 60
INNER_IMPORTS = 24  # of what is slow to import, and checks do not need
FIELDS = 20
LONGEST_FILE = 500  # but for the kernels in C


def nodes(kind: type | tuple[type, ...]) -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield path.relative_to(SOURCE).as_posix(), node


def test_no_function_is_longer_than_a_screen() -> None:
    long = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
        if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    }
    assert not long


def test_imports_stand_at_the_top() -> None:
    inner = [
        f"{path}:{statement.lineno}"
        for path, function in nodes(ast.FunctionDef)
        for statement in ast.walk(function)
        if isinstance(statement, ast.Import | ast.ImportFrom)
    ]
    assert len(set(inner)) <= INNER_IMPORTS, inner


def test_settings_come_in_groups() -> None:
    flat = {
        name: len(inspect.get_annotations(kind))
        for name, kind in vars(config).items()
        if inspect.isclass(kind) and len(inspect.get_annotations(kind)) >= FIELDS
    }
    assert not flat


def test_files_have_an_end() -> None:
    sizes = {
        path.relative_to(SOURCE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCE.rglob("*")
        if path.suffix in (".py", ".js")
    }
    assert not {path: n for path, n in sizes.items() if n > LONGEST_FILE}
