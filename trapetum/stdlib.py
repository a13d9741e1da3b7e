"""Documents that ship with every Python: the standard library's sources, its docstrings, the language reference.

They are read from the running interpreter when they are needed; nothing of them is committed.
"""

import ast
import functools
import importlib
import inspect
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Tables, bundled data and files that say where this interpreter was built: no prose, or not the same elsewhere.
_SKIPPED = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "__phello__"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")
_COMPILED = """
    _asyncio _bisect _bz2 _codecs _collections _contextvars _csv _ctypes _curses _datetime _decimal _elementtree
    _functools _hashlib _heapq _imp _io _json _lsprof _lzma _multiprocessing _operator _pickle _posixsubprocess _queue
    _random _socket _sqlite3 _sre _ssl _statistics _string _struct _thread _tracemalloc _warnings _weakref _zoneinfo
    array atexit binascii builtins cmath errno fcntl gc grp itertools marshal math mmap posix pwd resource select
    signal sys syslog termios time unicodedata zlib
""".split()


class TextError(ValueError):
    """A text could not be found or fetched; the message says which and what to do."""


@dataclass(frozen=True)
class Document:
    """One piece of text.

    Attributes:
        name: dotted module name, or a `pydoc` topic.
        kind: `module` (a source), `test` (a source of a test package), `compiled` (the docstrings of a module
            written in C) or `topic`.
        text: the text.
    """

    name: str
    kind: str
    text: str

    @property
    def group(self) -> str:
        """What is held out together: a topic, or a package with its tests and its twins in C (`_pyio`, `_io`)."""
        if self.kind == "topic":
            return f"topic:{self.name}"
        parts = self.name.split(".")
        if parts[0] == "test" and len(parts) > 1:
            parts = [parts[1].removeprefix("test_")] + parts[2:]
        return re.sub(r"^_(py)?(?=[a-z])", "", parts[0])


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_test(name: str) -> bool:
    return any(part in ("test", "tests") or part.startswith("test_") for part in name.split("."))


def _wanted(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return not any(part in _SKIPPED or part.startswith(_SKIPPED_PREFIXES) for part in parts)


def _read_source(path: Path) -> str | None:
    """A source in its declared encoding, or None where a test file is malformed on purpose."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None


def _sources(root: Path) -> Iterable[Document]:
    for path in sorted(root.rglob("*.py")):
        if _wanted(path, root) and (text := _read_source(path)):
            name = _module_name(path, root)
            yield Document(name, "test" if _is_test(name) else "module", text)


def _topics() -> Iterable[Document]:
    try:
        from pydoc_data import topics
    except ImportError:
        return
    for name, text in sorted(topics.topics.items()):
        yield Document(name, "topic", text)


def _entry(name: str, signature: str, doc: str) -> str:
    """One documented name as `pydoc` would set it: the call on a line, its docstring indented below."""
    lines = (f"    {line}".rstrip() for line in doc.strip().split("\n"))
    return f"{name}{signature}\n" + "\n".join(lines)


def _members(prefix: str, owner: object, module: str) -> Iterable[str]:
    """The entries of a compiled module's public functions, classes and methods."""
    for name, value in sorted(vars(owner).items()):
        if name.startswith("_") or not callable(value) or inspect.ismodule(value):
            continue
        if isinstance(value, type) and (prefix or value.__module__.lstrip("_") != module.lstrip("_")):
            continue
        if isinstance(value.__doc__, str) and value.__doc__.strip():
            signature = getattr(value, "__text_signature__", None) or ""
            yield _entry(
                prefix + name,
                re.sub(r"\$module(, /)?(, )?|\$", "", signature),
                inspect.cleandoc(value.__doc__),
            )
        if isinstance(value, type):
            yield from _members(f"{name}.", value, module)


def _compiled() -> Iterable[Document]:
    for name in _COMPILED:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        entries = [module.__doc__ or "", *_members("", module, name)]
        yield Document(name, "compiled", "\n\n".join(filter(None, entries)))


def stdlib_documents(stdlib: Path | None = None) -> list[Document]:
    """Read the standard library's sources, the compiled modules' docstrings and `pydoc`'s topics.

    Args:
        stdlib: folder of the sources; by default the running interpreter's. Topics and compiled modules are always
            the running interpreter's.

    Returns:
        the documents, sorted by kind and name. Some distributions leave out the test packages or IDLE.

    Raises:
        TextError: the folder holds no Python source.
    """
    root = Path(stdlib or sysconfig.get_path("stdlib"))
    documents = list(_sources(root))
    if not documents:
        raise TextError(f"no Python source was found in {root}; give the folder that holds os.py.")
    return documents + list(_compiled()) + list(_topics())


@functools.lru_cache(maxsize=2048)
def docstrings(source: str) -> str:
    """The documented names of a module's source, one entry each: the call, then its docstring indented.

    Args:
        source: Python source text.

    Returns:
        the module's own docstring first, entries separated by blank lines; empty where there is no docstring or
        the source is for another Python version.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in sources for another Python version
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    return "\n\n".join(_documented(tree, ""))


def _documented(node: ast.AST, prefix: str) -> Iterable[str]:
    if isinstance(node, ast.Module) and (doc := ast.get_docstring(node)):
        yield doc.strip()
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if doc := ast.get_docstring(child):
            yield _entry(prefix + child.name, _signature(child), doc)
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, f"{prefix}{child.name}.")


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    return f"({ast.unparse(node.args)})"
