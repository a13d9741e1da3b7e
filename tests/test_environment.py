"""environment.yml only leads to pyproject.toml, and the two agree."""

import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from trapetum.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def test_environment_only_refers_to_the_project():
    assert set(ENVIRONMENT) == {"name", "channels", "dependencies"}
    assert ENVIRONMENT["name"] == PROJECT["name"]
    python, pip, requirements = ENVIRONMENT["dependencies"]
    assert pip == "pip"
    (line,) = requirements["pip"]
    flag, target = line.split()
    assert flag == "-e"
    extras = Requirement(target.replace(".", PROJECT["name"], 1)).extras
    assert extras and extras <= set(PROJECT["optional-dependencies"])
    assert python.startswith("python ")


def test_python_ranges_are_the_same():
    conda = SpecifierSet(ENVIRONMENT["dependencies"][0].removeprefix("python "))
    assert conda == SpecifierSet(PROJECT["requires-python"])


def test_every_requirement_parses_and_torch_is_bounded():
    every = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    by_name = {Requirement(line).name: Requirement(line) for line in every}
    assert by_name["torch"].specifier == SpecifierSet(">=2.9,<2.14")


def test_makefile_targets_exist():
    text = (ROOT / "Makefile").read_text()
    for target in ("report", "test", "lab", "bench"):
        assert f"\n{target}: " in text
