"""One training on one process or many: replicas (DDP), shards (FSDP2), or DeepSpeed's ZeRO.

FSDP2 is PyTorch's `fully_shard`. Accelerate's plugin calls it too, but silently ignores the plugin
on a CPU. We call it directly, so that two CPU processes in a test run the same code as eight GPUs.

Importing this file is cheap (no torch): child processes call `end_with_parent` before they load
anything.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING

from vflan.config import ROOT, Recipe, read_json, shown
from vflan.io import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from accelerate import Accelerator
    from torch import nn, optim

ENDS_WITH_STDIN = "VFLAN_ENDS_WITH_STDIN"  # set by `launch`: stdin is a pipe from the parent
LAST_LINES = 30  # of the children's output, quoted when they fail


@dataclass(frozen=True)
class TrainState:
    """The model and its optimizer, as one process of a run holds them."""

    accelerator: Accelerator
    sharding: str  # none (one process, or a replica in each), fsdp2, zero2, zero3
    model: nn.Module
    learner: nn.Module  # wraps the model; training calls this one
    optimizer: optim.Optimizer

    @contextmanager
    def forward_pass(self, last: bool) -> Iterator[None]:
        """Wrap one of the passes whose gradients make up a step.

        Replicas (DDP) exchange gradients in the last pass only. Sharded models do it in every pass,
        because no process has room for a whole gradient.
        """
        from torch.nn.parallel import DistributedDataParallel

        replicated = isinstance(self.learner, DistributedDataParallel)
        # DeepSpeed takes its optimizer step when this is true.
        self.accelerator.sync_gradients = last
        no_sync = self.learner.no_sync() if replicated and not last else nullcontext()
        with no_sync, self.accelerator.autocast():
            yield


def load_for_training(recipe: Recipe, init: str | None, accelerator: Accelerator) -> nn.Module:
    """Load the model that a run starts from. Every process calls this.

    If the model will be sharded, only the main process reads it: a machine then holds one whole
    model, and not one a process. The others get its shape here, with the vision tower, which every
    process keeps whole; `distribute` gives them their shares of the rest.
    """
    from accelerate.utils import broadcast_object_list

    from vflan.models import llava as models
    from vflan.models.sharding import empty_model, outline, receive

    if sharding(recipe, accelerator.num_processes) != "fsdp2":
        return models.load_model(recipe, init)
    model = models.load_model(recipe, init) if accelerator.is_main_process else None
    message = [outline(model) if accelerator.is_main_process else None]
    broadcast_object_list(message)
    model = model if accelerator.is_main_process else empty_model(**message[0])
    receive(models.parts(model)["vision_tower"].modules(), accelerator.device)
    return model


def distribute(
    accelerator: Accelerator, learner: nn.Module, make_optimizer: Callable, recipe: Recipe
) -> TrainState:
    """Replicate or shard a learner over the processes, then make its optimizer."""
    model, kind = learner.model, sharding(recipe, accelerator.num_processes)
    # FSDP2 replaces weights, so the optimizer is made after it; DeepSpeed wraps an optimizer.
    if kind == "fsdp2":
        from vflan.models.sharding import shard

        shard(learner, recipe, accelerator.device)
        optimizer = make_optimizer()
    elif kind == "none":
        learner = accelerator.prepare(learner)
        optimizer = make_optimizer()
    else:
        learner, optimizer = accelerator.prepare(learner, make_optimizer())
    return TrainState(accelerator, kind, model, learner, optimizer)


def sharding(recipe: Recipe, processes: int, on_gpus: bool | None = None) -> str:
    """Resolve `recipe.sharding` for this number of processes: none, fsdp2, zero2 or zero3.

    `auto` shards only a fully tuned language model on GPUs: it needs 16 bytes a weight, which from
    7B on is too much for one GPU. `on_gpus=None` asks this machine.
    """
    if processes == 1:
        return "none"
    if recipe.sharding != "auto":
        return recipe.sharding
    if on_gpus is None:
        from vflan.models.quantisation import uses_gpu

        on_gpus = uses_gpu(recipe)
    full = "language_model" in recipe.tune and not recipe.lora_r and recipe.optimizer == "adamw"
    return "fsdp2" if full and on_gpus else "none"


def world_size() -> int:
    """Return how many processes torchrun started, on all machines together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_processes(recipe: Recipe, processes: int) -> None:
    """Raise before any work is done if this number of processes cannot train this recipe.

    ValueError: the batch cannot be divided, or there are too few GPUs. ImportError: a library is
    missing. RuntimeError: the processes could not reach each other.
    """
    import torch

    rows_per_process(recipe, processes)
    if processes > 1:
        _check_loopback()
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if gpus and local > gpus and recipe.device != "cpu":
        raise ValueError(
            f"This machine has {gpus} GPUs, but {local} processes were requested; "
            f"start {gpus} at most."
        )
    if not gpus or recipe.device == "cpu":
        check_cores(local)
    if recipe.sharding.startswith("zero") and not find_spec("deepspeed"):
        raise ImportError(
            f"sharding={recipe.sharding!r} needs DeepSpeed: pip install deepspeed, "
            "or set sharding='fsdp2'."
        )
    for name in recipe.trackers:
        if not find_spec(name):
            raise ImportError(
                f"trackers={recipe.trackers}: pip install {name}, or remove it from the recipe; "
                "metrics.jsonl is written anyway."
            )


def _check_loopback():
    # torchrun would try for more than a minute, and without a word.
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise RuntimeError(
            "Several processes reach each other over this machine's own network, 127.0.0.1, and "
            f"it does not answer ({error.strerror or error}): start it (ip link set lo up), or "
            "train with one process."
        ) from None


def check_device(recipe: Recipe) -> None:
    """RuntimeError for a bf16 recipe without a usable GPU: a CPU would train it in fp32."""
    if recipe.precision == "fp32" or recipe.device == "cpu":
        return
    from vflan.training.gpus import find_problem

    if problem := find_problem():
        raise RuntimeError(
            f"{recipe.name} has precision='bf16', which needs a GPU, and PyTorch can use none: "
            f"{problem} To train on the CPU in fp32, set device='cpu'."
        )


def check_count(processes: int) -> None:
    """ValueError if this is no number of processes."""
    if isinstance(processes, bool) or not hasattr(processes, "__index__") or processes < 1:
        raise ValueError(f"{processes!r} processes: a whole number of at least 1 is needed.")


def check_cores(processes: int) -> None:
    """ValueError if a machine without GPUs would be given more than four processes a core."""
    # More would only take memory, and thousands of them the machine.
    cores = os.cpu_count() or 1
    if processes > 4 * cores:
        raise ValueError(
            f"This machine has {cores} cores, but {processes} processes were requested; "
            f"start {cores} at most."
        )


def rows_per_process(recipe: Recipe, processes: int) -> int:
    """Return each process's rows of a global batch; ValueError if it cannot be divided evenly."""
    batch = recipe.global_batch
    check_count(processes)
    if batch % processes:
        divisor = max(n for n in range(1, min(processes, batch) + 1) if batch % n == 0)
        why = "are more than its samples" if batch < processes else "cannot share it evenly"
        raise ValueError(
            f"global_batch={batch}: {processes} processes {why}; "
            f"start {divisor}, or make it a multiple of {processes}."
        )
    return batch // processes


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """Connect to the other processes of a run, if there are any. Trackers write below `folder`."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import ProjectConfiguration
    from transformers.integrations import unset_hf_deepspeed_config

    from vflan.models.quantisation import compute_dtype, uses_gpu

    # A notebook trains several recipes in one process, so the state of the last one is dropped.
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    half = compute_dtype(recipe) == torch.bfloat16
    on_cpu, options = not uses_gpu(recipe), {}
    if recipe.trackers:
        logs = ProjectConfiguration(str(folder), logging_dir=str(folder / "tensorboard"))
        options = dict(log_with=list(recipe.trackers), project_config=logs)
    # This comes first, because Accelerate believes that DeepSpeed needs a GPU. The timeout is long
    # because the others wait while the main process checks up to a million samples.
    PartialState(cpu=on_cpu, timeout=timedelta(hours=1))
    if sharding(recipe, world_size()).startswith("zero"):
        options["deepspeed_plugin"] = _deepspeed(recipe, half)
    else:
        options["cpu"] = on_cpu
    accelerator = Accelerator(mixed_precision="bf16" if half else "no", **options)
    # Otherwise from_pretrained would load ZeRO-3 shards; `distribute` shards the model later.
    unset_hf_deepspeed_config()
    return accelerator


def _deepspeed(recipe, half):
    from accelerate import DeepSpeedPlugin

    config = {
        "zero_optimization": {"stage": int(recipe.sharding[-1])},
        "bf16": {"enabled": half},
        "gradient_clipping": recipe.max_grad_norm,
        # The trainer already divides the loss by the tokens of the global batch.
        "gradient_accumulation_steps": 1,
        # DeepSpeed only reports this number; the trainer forms the batches.
        "train_micro_batch_size_per_gpu": 1,
    }
    return DeepSpeedPlugin(zero3_init_flag=False, hf_ds_config=config)


def launch(folder: Path, num_processes: int) -> None:
    """Train the run in `folder` with several processes on this machine, and show their output.

    The printed command can be pasted into a cluster script; torch.distributed.run has options for
    more machines. RuntimeError quotes the last lines if a process fails.
    """
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += [str(num_processes), "-m", "vflan", "train"]
    after = ["--processes", str(num_processes)]
    say(" ".join(["python", *command, shown(Path(folder)), *after]), sys.stdout)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    command, lines = [sys.executable, *command, str(folder), *after], []
    # Libraries may print bytes that are no text.
    options = dict(text=True, errors="replace", env=_environment(folder))
    child = subprocess.Popen(command, **options, **pipes)
    try:
        for line in child.stdout:
            # Timings go to stderr: a notebook would store those on stdout.
            say(line.removesuffix("\n"))
            lines = [*lines, line][-LAST_LINES:]
    except BaseException:
        # An interrupted notebook cell stops its children too.
        child.terminate()
        raise
    finally:
        child.stdin.close()
        status = child.wait()
    if status:
        raise RuntimeError(
            f"Training with {num_processes} processes failed (exit {status}); "
            f"its last lines:\n{''.join(lines)}"
        )


def _environment(folder):
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
    # The children take the folder's lock after this process has released it. In between, another
    # process could start a different recipe there, so they compare the folder with this record.
    folder = Path(folder)
    begun = read_json(folder / "recipe.json") | read_json(folder / "init.json")
    environment = dict(
        PYTHONPATH=os.pathsep.join(filter(None, paths)),
        VFLAN_HOME=str(ROOT),
        VFLAN_BEGUN=json.dumps(begun, sort_keys=True),
    )
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return os.environ | environment | {ENDS_WITH_STDIN: "1", "OMP_NUM_THREADS": threads}


def end_with_parent() -> None:
    """Make this process exit as soon as the one that started it is gone, however that one ended.

    A `multiprocessing` child waits for its parent. A child of `launch` waits for its stdin to
    close, because torchrun is in between. Any other process goes on as before.
    """
    parent = parent_process()
    if parent is None and not os.environ.get(ENDS_WITH_STDIN):
        return

    def wait():
        if parent:
            parent.join()
        else:
            os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
