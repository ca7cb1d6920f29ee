"""pyproject.toml, lock files, containers and wheels agree with each other; the examples run."""

import ast
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tomllib
from contextlib import suppress
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vflan.config import SHIPPED_FILES

HOME = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
LOCK = (HOME / "requirements.lock").read_text().splitlines()


def locked():
    """{name: its versions in the lock}, several where they depend on the Python version."""
    versions = {}
    for line in LOCK:
        requirement = Requirement(line)
        versions.setdefault(canonicalize_name(requirement.name), []).append(requirement.specifier)
    return versions


@pytest.mark.parametrize("line", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
def test_the_lock_holds_every_dependency_in_an_allowed_version(line):
    requirement = Requirement(line)
    pins = locked()[canonicalize_name(requirement.name)]
    for pin in pins:
        (exact,) = pin
        assert exact.operator == "==" and requirement.specifier.contains(exact.version)


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
    assert conda == ["python=3.11", "pip"] and pip == {
        "pip": ["-r requirements.lock", "-e .[test]"]
    }
    assert "3.11" in Requirement(f"python{PROJECT['requires-python']}").specifier


CLEAN = [
    "changed=$(git status --porcelain)",
    'if [ -n "$changed" ]; then',
    "    echo 'These files changed; the demo and the tests may write only below what git ignores:'",
    '    echo "$changed"',
    "    exit 1",
    "fi",
]


def test_continuous_integration_runs_what_a_person_runs():
    script = [
        line
        for line in (HOME / ".ci/run").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert (
        script
        == [
            "set -euo pipefail",
            'cd "$(dirname "$0")/.."',
            "make demo",
            "make notebooks-test",
            "make test",
        ]
        + CLEAN
    )
    assert (HOME / ".ci/run").stat().st_mode & 0o111
    steps = yaml.safe_load((HOME / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    (python,) = (
        step["with"]["python-version"] for step in steps if "python@" in step.get("uses", "")
    )
    job = yaml.safe_load((HOME / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert python == "${{ matrix.python }}" and job["strategy"]["matrix"]["python"] == [
        "3.11",
        "3.13",
    ]
    assert job["env"]["PYTHON"] == "python"  # else make takes a python3.11 that the machine has too


def test_actions_are_pinned_to_a_commit_and_may_only_read():
    """A tag can be moved to other code; the comment says which release the commit is."""
    for path in (HOME / ".github/workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        uses = re.findall(r"uses: (.*)", text)
        assert uses
        for line in uses:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert "permissions" not in job and "secrets." not in str(job)
            (checkout,) = (step for step in job["steps"] if "checkout@" in step.get("uses", ""))
            assert checkout["with"] == {"persist-credentials": False}
        assert "pull_request_target" not in text  # would run a stranger's code with our rights


def test_the_container_works_as_a_user_without_rights():
    lines = (HOME / "Dockerfile").read_text(encoding="utf-8").splitlines()
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER vflan"] and lines.index("USER vflan") < lines.index("RUN make setup")


def test_ruff_finds_no_fault_of_security_and_each_exception_says_why():
    """The rules S of ruff: those of pyproject.toml have a comment, a noqa one in the line above."""
    text = (HOME / "pyproject.toml").read_text(encoding="utf-8")
    lint = tomllib.loads(text)["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    ignored = [lint["ignore"], *lint["per-file-ignores"].values()]
    for rule in {rule for rules in ignored for rule in rules if rule.startswith("S")}:
        assert re.fullmatch(r"S\d{3}", rule), f"{rule} is more than one rule"
        assert re.search(rf'"{rule}", # \w.{{20}}', text), f"{rule} has no reason"
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."]
    found = subprocess.run(command, cwd=HOME, capture_output=True, text=True).stdout
    assert [line for line in found.splitlines() if re.search(r": S\d{3} ", line)] == []
    for path in (path for folder in ("vflan", "bench", "tests", "examples", "docs")
                 for path in (HOME / folder).rglob("*.py")):  # fmt: skip
        lines = path.read_text(encoding="utf-8").splitlines()
        for i, line in enumerate(lines):
            if re.search(r"# noqa: .*S\d{3}", line) and "re.search" not in line:
                above = [lines[i - 1].strip(), lines[i - 2].strip()]
                assert any(words.startswith("# ") for words in above), f"{path.name}:{i + 1}"


def hashed(name):
    """Requirement -> its hashes, of a lock file with hashes."""
    text = (HOME / name).read_text().replace("\\\n", " ")
    entries = [re.split(r"\s+--hash=", line) for line in text.splitlines()]
    return {" ".join(entry.split()): hashes for entry, *hashes in entries}


def test_the_lock_files_with_hashes_hold_the_same_versions():
    """All but torch in the one; torch with what it needs, CUDA too, in the other."""
    pins = {" ".join(line.split()) for line in LOCK}
    rest, torch = hashed("requirements.hashes.lock"), hashed("requirements.torch.lock")
    (torch_pin,) = (pin for pin in pins if pin.startswith("torch=="))
    assert set(rest) == pins - {torch_pin}
    assert torch_pin in torch
    cuda = re.compile(r"(nvidia|cuda|triton)")
    of_torch = {pin.split()[0] for pin in torch if not cuda.match(pin)}
    assert of_torch <= {pin.split()[0] for pin in pins}
    makefile = (HOME / "Makefile").read_text()
    named = (
        re.search(r"^CUDA = ((?:.*\\\n)*.*)", makefile, re.MULTILINE)[1].replace("\\", " ").split()
    )
    assert {pin.split("==")[0] for pin in torch if cuda.match(pin)} == set(named)
    for pin, hashes in [*rest.items(), *torch.items()]:
        assert hashes and all(
            re.fullmatch(r"sha256:[0-9a-f]{64}", each.strip()) for each in hashes
        ), pin


@pytest.mark.parametrize("name", ["requirements.hashes.lock", "requirements.torch.lock"])
def test_no_lock_file_names_an_index_or_a_folder(name):
    for line in (HOME / name).read_text().splitlines():
        assert re.fullmatch(
            r"[a-z0-9-]+(\[[a-z,]+\])?==[\w.]+( ;.*)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line
        ), line
        assert "/" not in line and "://" not in line


def test_a_build_of_torch_for_the_cpu_is_the_locked_version():
    (pin,) = locked()["torch"]
    (version,) = pin
    assert pin.contains(f"{version.version}+cpu")


def imported(folder):
    """Top-level names of other packages that the modules below a folder import."""
    names = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"vflan"}


def test_every_import_is_declared_and_no_dependency_twice():
    declared = [canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]]
    assert len(declared) == len(set(declared))
    # asked for by name, in a sentence, where one of them is needed and not there
    optional = {"spacy", "deepspeed"}
    known = packages_distributions()
    for name in imported(HOME / "vflan") - optional:
        homes = {canonicalize_name(home) for home in known.get(name, [name])}
        assert homes & set(declared), f"{name} is imported, and {homes} is not in pyproject.toml"


WINDOWS = """
import os, sys
import psutil, torch  # on Linux they need what Windows builds of them do without
for name in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[name] = None
del os.register_at_fork, os.fork
import json
from pathlib import Path
from PIL import Image
import vflan
from importlib import import_module
from pkgutil import walk_packages

for module in walk_packages(vflan.__path__, "vflan."):
    if not module.name.endswith("__main__"):
        import_module(module.name)

os.mkdir("images")
Image.new("RGB", (48, 48)).save("images/a.png")
turns = [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A square."}]
rows = [{"id": str(i), "image": "a.png", "conversations": turns} for i in range(20)]
Path("rows.json").write_text(json.dumps(rows))
samples = vflan.load_samples("rows.json", "images")
assert len(samples) == 20 and "20 fine" in str(vflan.check(samples))
here = dict(samples=str(Path("rows.json").resolve()), images=str(Path("images").resolve()))
assert "step" in str(vflan.plan(vflan.replace(vflan.preset("tiny").base, **here)))
print("read, checked, planned")
"""


def test_importing_reading_checking_and_planning_need_nothing_that_windows_lacks(tmp_path):
    assert (
        run_installed(HOME, tmp_path, WINDOWS, VFLAN_CACHE=str(tmp_path))
        == "read, checked, planned"
    )


def package_data():
    """The files of the package that are not Python: templates, tables, type stubs."""
    return {
        path.relative_to(HOME).as_posix()
        for path in (HOME / "vflan").rglob("*.*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "shipped" not in path.parts
    }


@pytest.mark.parametrize(
    "target", ["demo", "paper", "publish", "test", "lab", "bench", "lock", "clean"]
)
def test_make_knows_its_targets(target):
    plan = subprocess.run(["make", "--dry-run", target], cwd=HOME, capture_output=True, text=True)
    assert plan.returncode == 0 and plan.stdout


def test_an_installed_environment_is_not_installed_again(tmp_path):
    """Only a changed lock or pyproject.toml makes `make` install again."""
    stamp = tmp_path / ".installed"
    stamp.touch()
    arguments = ["make", "--dry-run", "demo", f"VENV={tmp_path}"]
    assert (
        "pip install"
        not in subprocess.run(arguments, cwd=HOME, capture_output=True, text=True).stdout
    )
    stamp.unlink()
    assert (
        "pip install" in subprocess.run(arguments, cwd=HOME, capture_output=True, text=True).stdout
    )


# ------------------------------------------------ containers, Binder, several machines


def python_versions():
    """Where a version of Python is named, and which."""
    text = {
        name: (HOME / name).read_text()
        for name in ("Dockerfile", "Makefile", ".github/workflows/ci.yml")
    }
    conda = {
        name: yaml.safe_load((HOME / name).read_text())
        for name in ("environment.yml", "binder/environment.yml")
    }
    return {
        "Dockerfile": re.search(r"^FROM python:([\d.]+)", text["Dockerfile"], re.MULTILINE)[1],
        "Makefile": re.search(r"--python-version ([\d.]+)", text["Makefile"])[1],
        "ci.yml": re.search(r"python: \[\"([\d.]+)\"", text[".github/workflows/ci.yml"])[1],
        **{name: of["dependencies"][0].removeprefix("python=") for name, of in conda.items()},
        "pyproject.toml": PROJECT["requires-python"].removeprefix(">="),
    }


def test_every_way_to_set_up_takes_the_same_python():
    assert set(python_versions().values()) == {"3.11"}, python_versions()


def test_what_the_container_names_exists():
    lines = (HOME / "Dockerfile").read_text().splitlines()
    made = [
        target
        for line in lines
        if line.startswith("RUN")
        for target in re.findall(r"\bmake (\w+)$", line)
    ]
    makefile = (HOME / "Makefile").read_text()
    assert made == ["setup"] and all(
        re.search(rf"^{target}:", makefile, re.MULTILINE) for target in made
    )
    assert [line for line in lines if line.startswith("COPY")] == ["COPY --chown=vflan . ."]
    (start,) = (json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD"))
    assert (
        start[:4] == [".venv/bin/python", "-m", "jupyterlab", "notebooks"]
        and (HOME / "notebooks").is_dir()
    )
    kept_out = set((HOME / ".dockerignore").read_text().split())
    assert ".venv/" in kept_out and not kept_out & {
        "requirements.lock",
        "data/",
        "data/tiny/",
        "vflan/",
    }


def test_the_development_container_builds_the_same_dockerfile():
    home = HOME / ".devcontainer"
    about = json.loads((home / "devcontainer.json").read_text())
    assert (home / about["build"]["dockerfile"]).resolve() == HOME / "Dockerfile"
    assert (home / about["build"]["context"]).resolve() == HOME and about[
        "postCreateCommand"
    ] == "make setup"
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
    """A loop over two nodes stands in for srun, a script that records its arguments for Python."""
    shell(
        tmp_path,
        "scontrol",
        'test "$1 $2 $3" = "show hostnames node[0-1]" && printf "node0\\nnode1\\n"',
    )
    shell(tmp_path, "srun", 'for id in 0 1; do SLURM_NODEID=$id "$@"; done')
    shell(
        tmp_path,
        "python",
        f'printf "%s\\x1f" "$@" >> {tmp_path}/started; echo >> {tmp_path}/started',
    )
    slurm = dict(
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_JOB_ID="123456",
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="8",
    )
    env = (
        os.environ
        | slurm
        | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=str(tmp_path / "python"))
    )
    arguments = ["full_13b", "--changes", '{"save_every": 500, "name": "a b"}']
    subprocess.run(["bash", "examples/slurm.sbatch", *arguments], cwd=HOME, env=env, check=True)
    started = [
        line.rstrip("\x1f").split("\x1f")
        for line in (tmp_path / "started").read_text().splitlines()
    ]
    assert len(started) == 2
    for rank, line in enumerate(started):
        options = dict(zip(line[2:12:2], line[3:12:2]))
        assert line[:2] == ["-m", "torch.distributed.run"] and line[12:] == [
            "examples/train.py",
            *arguments,
        ]
        address = {"--master_addr": "node0", "--master_port": "23456"}
        assert (
            options
            == {"--nnodes": "2", "--node_rank": str(rank), "--nproc_per_node": "8"} | address
        )
    directives = re.findall(
        r"^#SBATCH --([\w-]+)", (HOME / "examples/slurm.sbatch").read_text(), re.MULTILINE
    )
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "time"} <= set(directives)


@pytest.mark.usefixtures("alone")
def test_torchruns_example_trains_the_three_stages_in_two_processes(recipe, tmp_path, free_port):
    values = {
        key: value
        for key, value in recipe.to_dict().items()
        if key not in ("name", "stage", "template")
    }
    (tmp_path / "mine.py").write_text(
        "from vflan.config import Preset, Recipe\n"
        f"values = {values | dict(global_batch=4, micro_batch=2)!r}\n"
        "def preset():\n"
        "    first = dict(name='projector', stage='projector', template='plain')\n"
        "    first['tune'] = ('projector',)\n"
        "    stages = [Recipe(name=name, stage=name, **values) for name in ('base', 'chat')]\n"
        "    return Preset(Recipe(**values | first), *stages)\n"
    )
    env = os.environ | dict(
        NPROC_PER_NODE="2", MASTER_PORT=str(free_port), PYTHON=sys.executable, PYTHONPATH=str(HOME)
    )
    command = [
        "bash",
        "examples/torchrun.sh",
        str(tmp_path / "mine.py"),
        "--changes",
        '{"max_steps": 1}',
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = subprocess.Popen(command, cwd=HOME, env=env, start_new_session=True, **pipes)
    try:
        output, _ = started.communicate(timeout=600)
        assert started.returncode == 0, output[-3000:]
    finally:  # also when it hangs: no process stays behind
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    done = [
        json.loads((tmp_path / "runs" / name / "done.json").read_text())
        for name in ("projector", "base", "chat")
    ]
    assert [(each["processes"], each["steps"]) for each in done] == [(2, 1)] * 3
    begun = json.loads((tmp_path / "runs/chat/init.json").read_text())
    assert begun["init_weights"] == done[1]["parts"]


@pytest.fixture
def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


# ------------------------------------------------ installed: a wheel works outside of a clone

USE = """
import json, os, subprocess, sys
from pathlib import Path
import vflan
from vflan import claims, plots
from vflan.tools.notebooks import find_notebooks
from vflan.config import ROOT, SHIPPED, commit, resolve

recipes = vflan.preset("tiny")
vflan.world.build(captions=32, per_kind=4, conversations=4, questions=0.02)
run = vflan.train(vflan.replace(recipes.projector, max_steps=2))
plots.style()
other = [sys.executable, "-c", "from vflan.config import ROOT; print(ROOT)"]
print(json.dumps({
    "root": str(ROOT),
    "shipped": str(SHIPPED),
    "run": str(run.folder),
    "steps": run.summary["steps"],
    "claims": len(claims.ledger()),
    "verdicts": len(claims.committed("06")),
    "printed": len(plots.paper()),
    "tasks": len(plots.task_list()),
    "notebooks": len(find_notebooks(resolve("notebooks"))),
    "figure": resolve("figures/tiny_frozen/selection.png").is_file(),
    "tower": recipes.projector.vision_tower,
    "of the package": str(resolve(recipes.projector.vision_tower)),
    "of a child": subprocess.run(other, cwd="/", capture_output=True, text=True).stdout.strip(),
    "commit": commit(),
}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a wheel is built from, so that building leaves nothing in the clone."""
    folder = tmp_path_factory.mktemp("source")
    files = (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "vflan",
        *SHIPPED_FILES,
    )
    for path in (path for pattern in files for path in HOME.glob(pattern)):
        place = folder / path.relative_to(HOME)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, place, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copyfile(path, place)
    return folder


@pytest.fixture(scope="module")
def site(source, tmp_path_factory):
    """A folder with vflan installed from a wheel; other packages come from this environment."""
    made, folder = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site-packages")
    pip = [sys.executable, "-m", "pip"]
    offline = ["--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(made), str(source)], check=True
    )
    (wheel,) = made.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", str(folder), str(wheel)], check=True)
    return folder


def test_a_wheel_holds_presets_and_all_files_that_are_not_python(site):
    data = package_data()
    assert {"vflan/__init__.pyi", "vflan/tools/templates/model_card.md"} <= data
    presets = {f"vflan/presets/{path.name}" for path in (HOME / "vflan/presets").glob("*.py")}
    assert presets and {name for name in data | presets if not (site / name).is_file()} == set()


def files_below(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def run_installed(site, folder, code, **variables):
    """What a script printed that imports the installed vflan, started in `folder`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("VFLAN_")}
    # Python itself would write bytecode beside the package, if pip had not.
    env = kept | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_an_installed_package_reads_its_own_files_and_writes_to_the_working_directory(
    site, tmp_path
):
    before = files_below(site)
    report = json.loads(run_installed(site, tmp_path, USE))
    assert files_below(site) == before  # nothing was written, changed or deleted there
    assert Path(report["root"]) == Path(report["of a child"]) == tmp_path
    assert Path(report["shipped"]) == site / "vflan" / "shipped"
    assert Path(report["of the package"]) == site / "vflan" / "shipped" / report["tower"]
    assert Path(report["run"]) == tmp_path / "runs" / "tiny" / "projector" and report["steps"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs"}
    made = {path.name for path in (tmp_path / "data" / "tiny").iterdir()} - {".building.lock"}
    assert made == {"samples", "benchmarks", "benchmarks_more"}
    rows = {"claims": "claims", "printed": "paper", "tasks": "tasks"}
    for name, table in rows.items():
        with (HOME / "data" / f"{table}.csv").open(encoding="utf-8", newline="") as file:
            assert report[name] == len(list(csv.DictReader(file))), table
    assert report["verdicts"] and report["figure"] and report["notebooks"] == 8
    assert not report["commit"]  # also when the working directory is a repository of somebody else


def test_vflan_home_says_where_an_installed_package_writes(site, tmp_path):
    code = "from vflan.config import CACHE, ROOT, output_path as of; "
    code += "print(ROOT, CACHE, of('runs'), sep='|')"
    printed = run_installed(site, tmp_path, code, VFLAN_HOME="my project").split("|")
    home = tmp_path / "my project"
    assert list(map(Path, printed)) == [home, home / "data" / "cache", home / "runs"]


def test_a_clone_is_its_own_project_folder(tmp_path):
    code = "from vflan.config import ROOT, SHIPPED; print(ROOT, SHIPPED, sep='|')"
    printed = run_installed(HOME, tmp_path, code).split("|")
    assert list(map(Path, printed)) == [HOME, HOME]


def test_a_source_archive_holds_all_that_a_wheel_is_built_from(source, tmp_path):
    """MANIFEST.in and SHIPPED_FILES name the same files: the archive has all that a wheel needs."""
    build = "from setuptools.build_meta import build_sdist; import sys; build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    needed = {
        file.relative_to(source).as_posix()
        for pattern in SHIPPED_FILES
        for path in source.glob(pattern)
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    }
    assert needed and needed <= held, sorted(needed - held)
    assert {"setup.py", "pyproject.toml", "vflan/presets/tiny.py"} | package_data() <= held
