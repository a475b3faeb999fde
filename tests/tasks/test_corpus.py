import ast
from pathlib import Path

import pytest

from tasks.corpus import package_documents

NESTED = '''
"""module {long}"""
try:
    class A:
        """A {long}"""
        def method(self):
            """method {long}"""
            with self:
                async def inner():
                    """inner {long}"""
except ImportError:
    def handled():
        """handled {long}"""
else:
    for _ in ():
        def looped():
            """looped {long}"""
finally:
    match 1:
        case 2:
            def matched():
                """matched {long}"""
if True:
    pass
elif False:
    def otherwise():
        """otherwise {long}"""
def brief():
    """Too short."""
'''


def test_docstrings_are_found_wherever_they_stand_in_the_order_of_ast_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nested").mkdir()
    source = NESTED.format(long="word " * 50)
    (tmp_path / "nested/__init__.py").write_text(source, encoding="utf-8")
    (document,) = package_documents("nested")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    assert document["text"].split("\n\n") == [text for text in found if len(text) >= 200]
    assert len(found) == 9
