"""The package imports downwards only, in the order that its docstring lists."""

import ast
import re

import trapetum
from trapetum.paths import ROOT

PACKAGE = ROOT / "trapetum"
PARTS_OF = {"record_rules": "records", "record_gate": "records", "record_table": "records"}
PARTS_OF |= {"machine_cpu": "machine", "machine_gpu": "machine", "__main__": "cli"}


def layers() -> dict[str, int]:
    """Module name -> line of the docstring's list it stands in."""
    listed, level = {}, 0
    for line in re.findall(r"^    (\S.*|  \S.*)$", trapetum.__doc__, re.MULTILINE):
        names = re.match(r"((?:\w+, )*\w+,?)  ", line.strip())[1]
        level += 0 if line.startswith("  ") else 1
        listed |= {name: level for name in names.rstrip(",").split(", ")}
    return listed


def module_of(path) -> str:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return PARTS_OF.get(name, name)


def imported(path) -> set[str]:
    """Modules of the package that a file imports anywhere, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "trapetum":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trapetum."):
            found.add(node.module.split(".")[1])
    return {PARTS_OF.get(name, name) for name in found if not name.startswith("__")}


def test_every_module_is_listed():
    modules = {module_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert modules == set(layers())


def test_imports_go_down():
    level = layers()
    upwards = [
        f"{path.relative_to(PACKAGE)} (line {level[module_of(path)]}) imports {name} (line {level[name]})"
        for path in sorted(PACKAGE.rglob("*.py"))
        if module_of(path) != "__init__"
        for name in imported(path)
        if level[name] > level[module_of(path)]
    ]
    assert upwards == []
