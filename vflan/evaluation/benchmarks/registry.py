"""Which benchmarks there are: those of this folder, of a file of yours, and of a notebook.

    vflan.BENCHMARKS["colours"] = COLOURS           known to this process
    vflan.evaluate(run, ["my_benchmark.py"])        the same, from a file

Other processes do not know them. `sweep` sends them to its workers; any other process needs the
file again.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from vflan.config import folder_name, resolve
from vflan.evaluation.benchmarks.benchmark import Benchmark

# Files of this folder that define no benchmark. `command` imports the registry, so it cannot be
# imported while the registry is filled.
_WITHOUT_BENCHMARK = {"benchmark", "command", "files", "registry"}


class UnknownBenchmark(ValueError, KeyError):
    """No benchmark of this name is known to this process."""

    def __str__(self) -> str:
        return self.args[0]  # KeyError would put the sentence in quotes


class _Titles(Mapping):
    """{name: title} for figures and tables; the name itself where no title is known."""

    def __init__(self, benchmarks: dict[str, Benchmark]):
        self._benchmarks = benchmarks

    def __getitem__(self, name: str) -> str:
        return getattr(self._benchmarks.get(name), "title", "") or name

    def __iter__(self) -> Iterator[str]:
        return iter(self._benchmarks)

    def __len__(self) -> int:
        return len(self._benchmarks)


class Benchmarks(dict):
    """{name: Benchmark}. A name that is not known raises UnknownBenchmark, with a sentence."""

    def __init__(self, shipped: dict[str, Benchmark]):
        super().__init__(shipped)
        self._shipped = dict(shipped)

    def __missing__(self, name: str):
        raise UnknownBenchmark(
            f"There is no benchmark {name!r}; known are {', '.join(self)}. A benchmark of your own "
            "has to be registered in each process that uses it: give its .py file in place of the "
            f"name, or set vflan.BENCHMARKS[{name!r}]."
        )

    def __setitem__(self, name: str, benchmark: Benchmark) -> None:
        """ValueError for a key that is not the benchmark's own name: files are found by that
        name.
        """
        if not hasattr(benchmark, "name"):
            raise ValueError(f"BENCHMARKS[{name!r}] has to be a Benchmark, not {benchmark!r}.")
        if benchmark.name != name:
            raise ValueError(
                f"BENCHMARKS[{name!r}] cannot hold a benchmark named {benchmark.name!r}: its "
                "folder, answers and scores go by its name, so use that as the key."
            )
        super().__setitem__(folder_name(name, "benchmark"), benchmark)

    def names(self, names_or_files: str | os.PathLike | Iterable) -> list[str]:
        """Names of benchmarks from names and .py files; a file's benchmarks are registered.

        UnknownBenchmark for a name that is not known, FileNotFoundError for a file that is not
        there.
        """
        if isinstance(names_or_files, (str, os.PathLike)):
            names_or_files = [names_or_files]
        names = []
        for entry in names_or_files:
            names += self.add_file(entry) if str(entry).endswith(".py") else [self[entry].name]
        return names

    def titles(self) -> Mapping[str, str]:
        """{name: title}; it follows later additions."""
        return _Titles(self)

    def add_file(self, path: str | os.PathLike) -> list[str]:
        """Run a .py file, register the benchmarks that it defines, and return their names."""
        file = Path(path) if Path(path).exists() else resolve(path)
        if not file.is_file():
            raise FileNotFoundError(f"{path}: there is no such benchmark file.")
        try:
            namespace = runpy.run_path(str(file), run_name=file.stem)
        except (Exception, SystemExit) as error:  # somebody else's code
            raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
        # Benchmarks that the file imports from vflan are not its own.
        shipped = list(map(id, self._shipped.values()))
        defined = [b for b in defined_in(namespace) if id(b) not in shipped]
        if not defined:
            raise ValueError(f"{path} defines no Benchmark; CONTRIBUTING.md has an example.")
        for benchmark in defined:
            if benchmark.name in self._shipped:
                raise ValueError(
                    f"{path}: {benchmark.name!r} is a benchmark of vflan; choose another name."
                )
            self[benchmark.name] = benchmark
        return [benchmark.name for benchmark in defined]

    def added(self) -> dict[str, Benchmark]:
        """The benchmarks that this process added to those of vflan, or put in their place."""
        return {
            name: benchmark
            for name, benchmark in self.items()
            if self._shipped.get(name) is not benchmark
        }

    def pack(self, names: Iterable[str]) -> bytes:
        """Those of `names` that were added, as bytes for `unpack` in another process; b"" for none.

        A function of a notebook, or of a file given by its path, cannot be imported elsewhere.
        dill therefore sends its code, where pickle would only send its name. ValueError for a
        benchmark that cannot be sent: one that holds an open file, for instance.
        """
        import dill

        added = self.added()
        sent = {name: added[name] for name in names if name in added}
        for name, benchmark in sent.items():
            try:
                dill.dumps(benchmark, recurse=True)
            except Exception as error:
                raise ValueError(
                    f"The benchmark {name!r} cannot be sent to the processes of a sweep "
                    f"({type(error).__name__}: {error}). Put it into a .py file and give the "
                    "file's path in benchmarks=, or run the sweep in this process with jobs=1."
                ) from error
        return dill.dumps(sent, recurse=True) if sent else b""

    def unpack(self, packed: bytes) -> None:
        """Register what `pack` packed; ValueError where it needs a module that is missing here."""
        if not packed:
            return
        import dill

        try:
            # Packed by `pack` in the process that started this one; never read from a file.
            sent = dill.loads(packed)  # noqa: S301
        except Exception as error:
            raise ValueError(
                "A benchmark of yours cannot be loaded in another process "
                f"({type(error).__name__}: {error}). Put it, and what it imports, into one .py "
                "file and give the file's path in benchmarks=, or run the sweep in this process "
                "with jobs=1."
            ) from error
        for name, benchmark in sent.items():
            self[name] = benchmark


def read_package(package: str, folders: Iterable[str], order: Iterable[str]) -> Benchmarks:
    """The benchmarks that the files of a package define: first those of `order`, then new ones.

    The order is that of the panels in a figure. ValueError where two files use the same name.
    """
    by_name = {}
    for module in sorted(module.name for module in iter_modules(folders)):
        if module in _WITHOUT_BENCHMARK:
            continue
        for benchmark in defined_in(vars(import_module(f"{package}.{module}"))):
            if by_name.setdefault(benchmark.name, benchmark) is not benchmark:
                raise ValueError(f"{module}.py: there is already a benchmark {benchmark.name!r}.")
    first = [name for name in order if name in by_name]
    return Benchmarks({name: by_name[name] for name in dict.fromkeys([*first, *by_name])})


def defined_in(namespace: dict) -> list[Benchmark]:
    """The benchmarks among the values of a module."""
    return [value for value in namespace.values() if isinstance(value, Benchmark)]
