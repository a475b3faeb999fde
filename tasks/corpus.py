"""Make text from the documentation of installed packages.

Every installation of numprune has tens of megabytes of English technical prose on disk: the docstrings of its own
dependencies. They train, calibrate and evaluate the reference model, split by package, so that the evaluation text is
never trained on.
"""

import ast
import json
import random
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from numprune.errors import NumpruneError
from numprune.files import replace_on_success
from tasks.layout import CORPUS
from tasks.parameters import load_parameters
from tasks.questions import write_questions
from tasks.step import run_step

# Shorter docstrings are mostly restated function names.
MIN_CHARACTERS = 200

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def corpus() -> None:
    """Writes the calibration text, the evaluation text, and questions about the latter."""
    settings = load_parameters().corpus
    write_corpus(settings.calibration, CORPUS / "calibration.jsonl", seed=settings.seed)
    write_corpus(settings.evaluation, CORPUS / "evaluation.jsonl", seed=settings.seed)
    write_questions(CORPUS / "evaluation.jsonl", CORPUS / "questions", count=settings.questions, seed=settings.seed)


def write_corpus(packages: Sequence[str], output: Path, *, seed: int) -> None:
    """Writes the documentation of installed packages as JSON lines, one Python module a line, in a seeded order.

    Args:
        packages: Names to import them by; none of them is imported.
        output: The `.jsonl` file to write; each line has the fields `package`, `module` and `text`.
        seed: Of the shuffle that mixes the packages.

    Raises:
        NumpruneError: If a package is not installed.
    """
    documents = [document for package in packages for document in package_documents(package)]
    random.Random(seed).shuffle(documents)
    with replace_on_success(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


def package_documents(package: str) -> Iterator[dict[str, str]]:
    """Yields one document for each module of a package that has docstrings; a docstring seen before is left out."""
    seen: set[str] = set()
    for root, path in _python_files(package):
        docstrings = [text for text in _docstrings(path) if text not in seen]
        seen.update(docstrings)
        if docstrings:
            name = (Path(package) / path.relative_to(root)).as_posix()
            yield {"package": package, "module": name, "text": "\n\n".join(docstrings)}


def _python_files(package: str) -> Iterable[tuple[Path, Path]]:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NumpruneError(f"The corpus package {package!r} is not installed: run `make setup`.")
    for location in spec.submodule_search_locations:
        root = Path(location)
        yield from ((root, path) for path in sorted(root.rglob("*.py")))


def _docstrings(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Invalid escapes in other people's sources.
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # Templates and fixtures that are no Python.
            return []
    docstrings = (ast.get_docstring(node) for node in _statements(tree) if isinstance(node, _DOCUMENTED))
    return [text for text in docstrings if text and len(text) >= MIN_CHARACTERS]


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Like `ast.walk`, without the expressions: most of a tree, and no docstring stands in them."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, field, ()))


if __name__ == "__main__":
    run_step(corpus)
