"""Several processes answer together: each loads the model and takes questions when it is free.

Also how the processes of a sweep are started. No process imports torch before it needs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING, Any

from vflan.training.distributed import end_with_parent

if TYPE_CHECKING:
    from vflan.evaluation.answer_cache import Answer
    from vflan.training.run import Run

START = "spawn"  # a forked process cannot use a GPU that its parent has used
_WORKER: dict[str, Any] = {}  # in a worker: its model, processor and share of the memory


def forking(soon: bool = False) -> BaseContext:
    """The context in which the processes of a sweep start: forked from a server process.

    The server imports torch and transformers once, which takes ten seconds. soon: start it now, so
    that it imports them while the caller continues. On systems without fork, processes are spawned.
    """
    # Windows has no fork.
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["vflan.training.trainer", "vflan.evaluation.evaluator"])
    if soon:
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    return context


@contextmanager
def working(
    run: Run, num_processes: int, batch_size: int, template: str, memory: float | None = None
) -> Iterator[Callable]:
    """A function ask(questions, max_new_tokens) that yields (index, Answer) from several processes.

    run: each process loads it, onto a GPU of its own if there are several. memory: bytes that each
    may take beside the weights (None: its share of what is free). The processes end with this
    block, and with their parent. They receive questions, not names of benchmarks, so a benchmark
    that was added at run time needs nothing more. RuntimeError if a process dies.
    """
    context = get_context(START)
    # Each worker takes one number from the queue: its GPU follows from it.
    ranks = context.Queue()
    for rank in range(num_processes):
        ranks.put(rank)
    pool = ProcessPoolExecutor(num_processes, context, _load, (run, num_processes, ranks))

    def ask(questions: list[dict], max_new_tokens: int) -> Iterator[tuple[int, Answer]]:
        # Four pieces for each process keep all of them busy until the end.
        size = max(1, min(2 * batch_size, len(questions) // (4 * num_processes)))
        settings = max_new_tokens, batch_size, template, memory
        pieces = {}
        try:
            # A process may have died since the last questions: then the pool takes no more.
            for piece in split_by_picture(questions, size):
                future = pool.submit(_answer, [questions[i] for i in piece], *settings)
                pieces[future] = piece
            for future in as_completed(pieces):
                yield from ((pieces[future][i], answer) for i, answer in future.result())
        except BrokenProcessPool:
            raise RuntimeError(
                "A process of the evaluation died; its message is above. Often it ran out of "
                "memory, or a script calls evaluate outside `if __name__ == '__main__':`. All "
                "answers so far are cached: call again to continue, with fewer processes or a "
                "smaller batch_size."
            ) from None
        finally:
            # Also runs if the reader stops early.
            for future in pieces:
                future.cancel()

    with pool:
        yield ask


def split_by_picture(questions: list[dict], size: int) -> list[list[int]]:
    """Indices of the questions in pieces of about `size`; those on one picture stay together."""
    # A picture is encoded once by the process that gets it.
    pictures: dict[Any, list[int]] = {}
    for i, question in enumerate(questions):
        pictures.setdefault(question["image"] or i, []).append(i)
    pieces = [[]]
    for indices in pictures.values():
        if len(pieces[-1]) >= size:
            pieces.append([])
        pieces[-1] += indices
    return pieces


def _load(run, num_processes, ranks) -> None:
    """Runs first in each worker: takes a rank and a GPU, and loads the model."""
    end_with_parent()
    rank, share = ranks.get(), num_processes
    import torch

    if torch.cuda.is_available():
        # The largest number of processes on one GPU.
        share = -(-num_processes // torch.cuda.device_count())
        gpu = rank % torch.cuda.device_count()
        # The loader reads LOCAL_RANK to place a quantised model.
        os.environ["LOCAL_RANK"] = str(gpu)
        torch.cuda.set_device(gpu)
    else:
        # The processes share the cores; more threads than cores would be slower.
        torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    _WORKER.update(model=run.load_model(), processor=run.processor(), share=share)


def _answer(questions, max_new_tokens, batch_size, template, memory) -> list[tuple[int, Answer]]:
    from vflan.evaluation.generation import answering
    from vflan.models.cache_size import free

    model, processor = _WORKER["model"], _WORKER["processor"]
    # Several processes may share a GPU, or the memory of a machine without one.
    memory = memory or free(model.device) // _WORKER["share"]
    return list(
        answering(model, processor, questions, max_new_tokens, batch_size, template, memory)
    )
