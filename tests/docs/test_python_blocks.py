"""Python blocks of the documentation run."""

import ast
from functools import partial

import pytest

from pais_ray.data.synthetic import generator
from tests.docs.pages import NOT_EXECUTED, blocks

PYTHON = blocks("python")


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generator, "generate", partial(generator.generate, train=40, val=4))  # 300 images take seconds
    code = compile(ast.parse(block.text), str(block), "exec")
    if not block.text.startswith(NOT_EXECUTED):
        exec(code, {"__name__": "documentation"})


def test_the_notebook_block_of_the_readme_is_executed():
    readme = [block for block in PYTHON if block.page == "README.md"]
    assert len(readme) == 1
    assert not readme[0].text.startswith(NOT_EXECUTED)
