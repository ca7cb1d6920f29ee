"""One notebook, from its first cell to its last, in a process that holds little else.

The process that calls this one has torch loaded. This file imports none of it: two notebooks run
side by side, and each would hold it once more.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vflan.tools.watch import Watch

# The first line of a kernel that will call vflan.sweep: the process that the sweep forks from
# loads while the notebook begins.
FORK_EARLY = "from vflan.evaluation.parallel import forking; forking(soon=True)"


class Stopped(RuntimeError):
    """A notebook failed; the message names the notebook, the cell and the error."""


def measured_run(source: Path, target: Path, parameters: dict) -> tuple[float, float]:
    """Run one notebook; (minutes, peak memory in GB) of this process and all its children."""
    with Watch() as watch:
        run_notebook(source, target, parameters)
    return watch.minutes, watch.peak_gb


def run_notebook(source: Path, target: Path, parameters: dict) -> None:
    """Execute one notebook in its own folder, as Jupyter and nbval do, and write it to `target`.

    Raises Stopped if a cell fails, the kernel dies or papermill cannot run it.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillException

    # no remarks of the kernel on how it is connected or stopped
    options = ["--IPKernelApp.log_level=50"]
    if "vflan.sweep(" in source.read_text(encoding="utf-8"):
        options.append(f"--IPKernelApp.exec_lines={FORK_EARLY}")
    try:
        papermill.execute_notebook(
            str(source),
            str(target),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            extra_arguments=options,
            cwd=str(source.parent),
            progress_bar={"desc": source.stem, "leave": False} if sys.stderr.isatty() else False,
        )
    except papermill.PapermillExecutionError as error:
        cell, sentence = error.exec_count, f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        reason = f"stopped in cell [{cell}] - {sentence}\nread on in {target}"
    except DeadKernelError:
        reason = f"lost its kernel, most likely for lack of memory; see {target}"
    except PapermillException as error:
        reason = f"could not be run: {error}"
    else:
        return
    raise Stopped(f"{source.name} {reason}")
