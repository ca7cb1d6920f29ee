"""Adds files from outside the package to a wheel: those that vflan reads (`SHIPPED_FILES`).

pyproject.toml cannot say that.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME))  # a build frontend does not put it there

from vflan.config import SHIPPED_FILES  # noqa: E402


class BuildWithShippedFiles(build_py):
    """Copies the files to vflan/shipped in the wheel.

    An editable install reads those of the clone, so nothing is copied.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "vflan" / "shipped"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for pattern in SHIPPED_FILES:
            sources = sorted(HOME.glob(pattern))
            if not sources:
                raise FileNotFoundError(
                    f"{pattern} is not in {HOME}: build from a whole clone or source archive."
                )
            for source in sources:
                place = target / source.relative_to(HOME)
                place.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    # Hidden files are locks, and what editors and Jupyter leave behind.
                    shutil.copytree(source, place, ignore=shutil.ignore_patterns(".*"))
                else:
                    shutil.copyfile(source, place)


setup(cmdclass={"build_py": BuildWithShippedFiles})
