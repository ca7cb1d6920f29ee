"""pyproject.toml, requirements.lock, environment.yml and the two commands say the same thing."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HOME = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
LOCK = (HOME / "requirements.lock").read_text().splitlines()


def locked():
    """Name -> the versions the lock holds for it (several where they depend on the Python version)."""
    versions = {}
    for line in LOCK:
        requirement = Requirement(line)
        versions.setdefault(canonicalize_name(requirement.name), []).append(requirement.specifier)
    return versions


@pytest.mark.parametrize("line", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
def test_the_lock_holds_every_dependency_in_an_allowed_version(line):
    wanted = Requirement(line)
    pins = locked()[canonicalize_name(wanted.name)]
    for pin in pins:
        (exact,) = pin
        assert exact.operator == "==" and wanted.specifier.contains(exact.version)


def test_the_lock_serves_every_machine():
    text = "\n".join(LOCK)
    assert "://" not in text and "--" not in text  # no hosts, no hashes, no options
    assert not re.search(
        r"^(nvidia|cuda|triton|torchvision)", text, re.MULTILINE
    )  # torch brings what its machine needs
    assert not re.search(r"\d\+cpu", text)


def test_conda_installs_the_same_lock():
    environment = yaml.safe_load((HOME / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["name"] == PROJECT["name"] and environment["channels"] == ["conda-forge"]
    assert conda == ["python=3.11", "pip"] and pip == {"pip": ["-r requirements.lock", "-e .[test]"]}
    assert "3.11" in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_continuous_integration_runs_what_a_person_runs():
    script = [line for line in (HOME / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert script == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]
    assert (HOME / ".ci/run").stat().st_mode & 0o111
    steps = yaml.safe_load((HOME / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]


def test_presets_are_shipped_with_the_package():
    assert sorted(p.name for p in (HOME / "vflan/presets").glob("*.py")) != []
    assert tomllib.loads((HOME / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"] == {
        "vflan": ["presets/*.py"]
    }


@pytest.mark.parametrize("target", ["demo", "test", "lab", "bench", "lock", "clean"])
def test_make_knows_its_targets(target):
    plan = subprocess.run(["make", "--dry-run", target], cwd=HOME, capture_output=True, text=True)
    assert plan.returncode == 0 and plan.stdout


def test_an_installed_environment_is_not_installed_again(tmp_path):
    """Only a changed lock or pyproject.toml makes `make` install again."""
    stamp = tmp_path / ".installed"
    stamp.touch()
    arguments = ["make", "--dry-run", "demo", f"VENV={tmp_path}"]
    assert "pip install" not in subprocess.run(arguments, cwd=HOME, capture_output=True, text=True).stdout
    stamp.unlink()
    assert "pip install" in subprocess.run(arguments, cwd=HOME, capture_output=True, text=True).stdout
