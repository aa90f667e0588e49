"""What people read is plain English: no phrase in it that makes a native reader stop and read again."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "pgguard").rglob("*.py"))
DOCUMENTS = (ROOT / "README.md", ROOT / "docker" / "README.md")

STUMBLING = {
    r"\bbe had\b": "is available, can be collected",
    r"\bfor want of\b": "because there is no …",
    r"\bwithout a word\b": "silently, without an answer, without Terminate",
    r"\b(?:do|does|did) without\b": "isn't available, can be left out",
    r"\bon pain of\b": "or it is an error",
    r"\bstands at\b": "is at",
    r"\bis (?:no|none of the) (?:setting|option|socket)s?\b": "isn't a …, there is no such …",
    r"\b(?:comes|come|came) about\b": "happens",
    r"\ball in all\b": "in total",
    r"\bsays? of (?:itself|himself|themselves)\b": "says about itself",
    r"\bSo it is\b": "that happens",
    r"\bnot known (?:who|which)\b": "nobody could be identified",
    r"\b(?:heir|heirs)\b": "the process that inherited the connection",
    r"\bto no avail\b": "in vain",
}
"""Phrases, each with what says the same so that it is read once."""


def shown(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a module that aren't documentation, each with its line."""
    tree = ast.parse(path.read_text())
    documentation = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    """Everything that people read, each with where it is."""
    lines = [(path, line, text) for path in SOURCES for line, text in shown(path)]
    lines += [(path, n, text) for path in DOCUMENTS for n, text in enumerate(path.read_text().splitlines(), 1)]
    return [(f"{path.relative_to(ROOT)}:{line}", text) for path, line, text in lines]


@pytest.mark.parametrize("phrase", STUMBLING)
def test_no_text_has_a_phrase_that_is_read_twice(phrase: str, texts: list[tuple[str, str]]) -> None:
    found = [f"{where}: {text[:120]}" for where, text in texts if re.search(phrase, text)]
    assert not found, f"say: {STUMBLING[phrase]}"


def test_what_is_documentation_is_not_taken_for_what_is_shown() -> None:
    found = [text for _, text in shown(Path(__file__))]
    assert __doc__ not in found
    assert "is available, can be collected" in found
