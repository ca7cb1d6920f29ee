"""Several processes answer together: each has the model, and takes the next few pictures whenever it is free.

Also how a sweep's processes begin. Nothing here reads torch before a process needs it.
"""

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context

from vflan.training.distributed import end_with_parent

START = "spawn"  # a forked process cannot use a GPU that its parent has used
_HERE = {}  # in a worker: its model and processor


def forking(soon=False):
    """How the processes of a sweep begin: forked from one that has read torch and transformers (ten seconds).

    soon: start that one now, to read while the caller goes on. Where there is no fork, each begins from nothing.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["vflan.training.trainer", "vflan.evaluation.evaluator"])
    if soon:
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    return context


@contextmanager
def working(run, num_processes, batch_size, template, memory=None):
    """A function like `answering`: ask(questions, max_new_tokens) yields (index, Answer), from several processes.

    run: a Run; each process loads it (onto a GPU of its own, where there are several). memory: bytes that each may
    take beside it (None: its share of what is free). The processes end with this block, and with their parent.
    """
    context = get_context(START)
    ranks = context.Queue()
    for rank in range(num_processes):
        ranks.put(rank)
    with ProcessPoolExecutor(num_processes, context, _begin, (run, num_processes, ranks)) as pool:

        def ask(questions, max_new_tokens):
            pieces = cut(
                questions, max(1, min(2 * batch_size, len(questions) // (4 * num_processes)))
            )
            todo = {pool.submit(_answer, [questions[i] for i in piece], max_new_tokens, batch_size, template, memory): piece
                    for piece in pieces}  # fmt: skip
            try:
                for future in as_completed(todo):
                    yield from ((todo[future][j], answer) for j, answer in future.result())
            except BrokenProcessPool:
                raise RuntimeError(
                    "A process of the evaluation died, its message is above (out of memory, often; or a script that does "
                    "not call evaluate under `if __name__ == '__main__':`). All answers so far are kept: call again to go "
                    "on, with fewer processes or a smaller batch_size."
                ) from None
            finally:
                for future in todo:
                    future.cancel()

        yield ask


def cut(questions, size):
    """Indices of the questions in pieces of about `size`; those on one picture stay together."""
    pictures = {}
    for i, question in enumerate(questions):
        pictures.setdefault(question["image"] or i, []).append(i)
    pieces = [[]]
    for indices in pictures.values():
        if len(pieces[-1]) >= size:
            pieces.append([])
        pieces[-1] += indices
    return pieces


def _begin(run, num_processes, ranks):
    end_with_parent()
    rank = ranks.get()
    import torch

    share = num_processes
    if torch.cuda.is_available():
        share = -(-num_processes // torch.cuda.device_count())
        gpu = rank % torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(gpu)  # where the loader puts a quantised model
        torch.cuda.set_device(gpu)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    _HERE.update(model=run.load_model(), processor=run.processor(), share=share)


def _answer(questions, max_new_tokens, batch_size, template, memory):
    from vflan.evaluation.generation import answering
    from vflan.models.cache_size import free

    model, more = _HERE["model"], (max_new_tokens, batch_size, template)
    # several processes may share a GPU, or the memory of a machine without one
    memory = memory or free(model.device) // _HERE["share"]
    return list(answering(model, _HERE["processor"], questions, *more, memory))
