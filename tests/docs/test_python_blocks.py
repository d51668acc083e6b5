"""Python blocks of the documentation run."""

import ast

import pytest

from tests.docs.pages import NOT_EXECUTED, blocks

PYTHON = blocks("python")


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(ast.parse(block.text), str(block), "exec")
    if not block.text.startswith(NOT_EXECUTED):
        exec(code, {"__name__": "documentation"})
