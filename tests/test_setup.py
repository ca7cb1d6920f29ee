"""pyproject.toml, requirements.lock and all that sets vflan up somewhere say the same thing; the examples start what they say."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from contextlib import suppress
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


# ----------------------------------------------------------------- containers, Binder, several machines: the same files


def python_versions():
    """Where a version of Python is named, and which."""
    text = {name: (HOME / name).read_text() for name in ("Dockerfile", "Makefile", ".github/workflows/ci.yml")}
    conda = {name: yaml.safe_load((HOME / name).read_text()) for name in ("environment.yml", "binder/environment.yml")}
    return {
        "Dockerfile": re.search(r"^FROM python:([\d.]+)", text["Dockerfile"], re.MULTILINE)[1],
        "Makefile": re.search(r"--python-version ([\d.]+)", text["Makefile"])[1],
        "ci.yml": re.search(r"python-version: \"([\d.]+)\"", text[".github/workflows/ci.yml"])[1],
        **{name: of["dependencies"][0].removeprefix("python=") for name, of in conda.items()},
        "pyproject.toml": PROJECT["requires-python"].removeprefix(">="),
    }


def test_every_way_to_set_up_takes_the_same_python():
    assert set(python_versions().values()) == {"3.11"}, python_versions()


def test_what_the_container_names_exists():
    lines = (HOME / "Dockerfile").read_text().splitlines()
    made = [target for line in lines if line.startswith("RUN") for target in re.findall(r"\bmake (\w+)$", line)]
    makefile = (HOME / "Makefile").read_text()
    assert made == ["setup"] and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in made)
    assert [line for line in lines if line.startswith("COPY")] == ["COPY --chown=vflan . ."]
    (start,) = (json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD"))
    assert start[:4] == [".venv/bin/python", "-m", "jupyterlab", "notebooks"] and (HOME / "notebooks").is_dir()
    kept_out = set((HOME / ".dockerignore").read_text().split())
    assert ".venv/" in kept_out and not kept_out & {"requirements.lock", "data/", "data/tiny/", "vflan/"}


def test_the_development_container_builds_the_same_dockerfile():
    home = HOME / ".devcontainer"
    about = json.loads((home / "devcontainer.json").read_text())
    assert (home / about["build"]["dockerfile"]).resolve() == HOME / "Dockerfile"
    assert (home / about["build"]["context"]).resolve() == HOME and about["postCreateCommand"] == "make setup"
    assert f"useradd --create-home {about['remoteUser']}" in (HOME / "Dockerfile").read_text()


def test_binder_installs_the_same_lock():
    conda = yaml.safe_load((HOME / "binder/environment.yml").read_text())
    assert conda["channels"] == ["conda-forge"] and conda["dependencies"] == ["python=3.11", "pip"]
    script = HOME / "binder/postBuild"
    assert script.stat().st_mode & 0o111 and subprocess.run(["bash", "-n", script]).returncode == 0
    commands = [line for line in script.read_text().splitlines() if line.startswith("python")]
    assert commands == [
        "python -m pip install --no-cache-dir -r requirements.lock",
        "python -m pip install --no-deps -e .",
    ]


def shell(folder, name, body):
    """A command of that name on the PATH of a test."""
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def test_a_slurm_job_starts_torchrun_on_every_node_with_one_address(tmp_path):
    """srun is played by a loop over two nodes, Python by a script that writes down what it was given."""
    shell(tmp_path, "scontrol", 'test "$1 $2 $3" = "show hostnames node[0-1]" && printf "node0\\nnode1\\n"')
    shell(tmp_path, "srun", 'for id in 0 1; do SLURM_NODEID=$id "$@"; done')
    shell(tmp_path, "python", f'printf "%s\\x1f" "$@" >> {tmp_path}/said; echo >> {tmp_path}/said')
    slurm = dict(SLURM_JOB_NODELIST="node[0-1]", SLURM_JOB_ID="123456", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="8")
    env = os.environ | slurm | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=str(tmp_path / "python"))
    asked = ["full_13b", "--changes", '{"save_every": 500, "name": "a b"}']
    subprocess.run(["bash", "examples/slurm.sbatch", *asked], cwd=HOME, env=env, check=True)
    started = [line.rstrip("\x1f").split("\x1f") for line in (tmp_path / "said").read_text().splitlines()]
    assert len(started) == 2
    for rank, line in enumerate(started):
        options = dict(zip(line[2:12:2], line[3:12:2]))
        assert line[:2] == ["-m", "torch.distributed.run"] and line[12:] == ["examples/train.py", *asked]
        address = {"--master_addr": "node0", "--master_port": "23456"}
        assert options == {"--nnodes": "2", "--node_rank": str(rank), "--nproc_per_node": "8"} | address
    directives = re.findall(r"^#SBATCH --([\w-]+)", (HOME / "examples/slurm.sbatch").read_text(), re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "time"} <= set(directives)


@pytest.mark.usefixtures("alone")
def test_torchruns_example_trains_the_three_stages_in_two_processes(recipe, tmp_path, free_port):
    values = {key: value for key, value in recipe.to_dict().items() if key not in ("name", "stage", "template")}
    (tmp_path / "mine.py").write_text(
        "from vflan.recipe import Preset, Recipe\n"
        f"values = {values | dict(global_batch=4, micro_batch=2)!r}\n"
        "def preset():\n"
        "    projector = Recipe(name='projector', stage='projector', template='plain', **values | dict(tune=('projector',)))\n"
        "    return Preset(projector, *(Recipe(name=name, stage=name, **values) for name in ('base', 'chat')))\n"
    )
    env = os.environ | dict(NPROC_PER_NODE="2", MASTER_PORT=str(free_port), PYTHON=sys.executable, PYTHONPATH=str(HOME))
    command = ["bash", "examples/torchrun.sh", str(tmp_path / "mine.py"), "--changes", '{"max_steps": 1}']
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = subprocess.Popen(command, cwd=HOME, env=env, start_new_session=True, **pipes)
    try:
        told, _ = started.communicate(timeout=600)
        assert started.returncode == 0, told[-3000:]
    finally:  # also when it hangs: no process stays behind
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    done = [json.loads((tmp_path / "runs" / name / "done.json").read_text()) for name in ("projector", "base", "chat")]
    assert [(each["processes"], each["steps"]) for each in done] == [(2, 1)] * 3
    begun = json.loads((tmp_path / "runs/chat/init.json").read_text())
    assert begun["init_weights"] == done[1]["parts"]


@pytest.fixture
def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]
