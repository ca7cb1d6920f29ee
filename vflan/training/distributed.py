"""One training on one process or many, on Accelerate: replicated (DDP), sharded (FSDP2), or by DeepSpeed's ZeRO.

FSDP2 is PyTorch's own `fully_shard`, which Accelerate's plugin calls too; here it is called directly, because Accelerate
ignores that plugin on a CPU without a word, and what cannot be tested on two cores is not known to work on eight GPUs.
"""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import ProjectConfiguration
from torch import nn
from transformers.integrations import unset_hf_deepspeed_config

from vflan.config import Recipe
from vflan.models import llava as models


@dataclass(frozen=True)
class Spread:
    """A model and its optimiser as one process of a run holds them."""

    accelerator: Accelerator
    how: str  # none (one process, or a replica in each), fsdp2, zero2, zero3
    model: nn.Module
    learner: nn.Module  # around the model: what is called
    optimizer: torch.optim.Optimizer

    @contextmanager
    def passes(self, last: bool):
        """Around each of the passes whose gradients make a step: replicas exchange theirs in the last one only.

        Sharded ones do so in each, because a whole gradient is what no process has room for.
        """
        replicas = isinstance(self.learner, nn.parallel.DistributedDataParallel)
        self.accelerator.sync_gradients = last  # DeepSpeed steps at the end of the last pass
        with (
            self.learner.no_sync() if replicas and not last else nullcontext(),
            self.accelerator.autocast(),
        ):
            yield


def spread(accelerator, learner: nn.Module, make_optimizer, recipe: Recipe) -> Spread:
    """Lay a learner out over the processes; the optimiser is made once the weights are where they stay."""
    model, how = learner.model, sharding(recipe, accelerator.num_processes)
    if how == "fsdp2":
        models.shard(learner, recipe)
        optimizer = make_optimizer()
    elif how == "none":
        learner = accelerator.prepare(learner)
        optimizer = make_optimizer()
    else:
        learner, optimizer = accelerator.prepare(learner, make_optimizer())
    return Spread(accelerator, how, model, learner, optimizer)


def sharding(recipe: Recipe, world: int, on_gpus: bool | None = None) -> str:
    """What `recipe.sharding` comes to with so many processes, on GPUs or not (None: as this machine has them).

    A fully tuned language model needs 16 bytes a weight, too much for one GPU from 7B on: `auto` shares it out.
    """
    if world == 1:
        return "none"
    if recipe.sharding != "auto":
        return recipe.sharding
    full = "language_model" in recipe.tune and not recipe.lora_r and recipe.optimizer == "adamw"
    return (
        "fsdp2" if full and (torch.cuda.is_available() if on_gpus is None else on_gpus) else "none"
    )


def started() -> int:
    """How many processes torchrun has started for this program, on all machines together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check(recipe: Recipe, world: int) -> None:
    """Can `world` processes train this recipe? ValueError or ImportError, one sentence, if not; before any time is spent."""
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    shares(recipe, world)
    if gpus and local > gpus:
        raise ValueError(
            f"{local} processes were asked for on a machine with {gpus} GPUs; start {gpus} at most."
        )
    if recipe.sharding.startswith("zero") and not find_spec("deepspeed"):
        raise ImportError(
            f"sharding={recipe.sharding!r} needs DeepSpeed: pip install deepspeed, or take sharding='fsdp2'."
        )
    for name in recipe.trackers:
        if not find_spec(name):
            raise ImportError(
                f"trackers={recipe.trackers}: pip install {name}, or leave it out; metrics.jsonl is written anyway."
            )


def shares(recipe: Recipe, world: int) -> int:
    """The rows of a global batch that each of `world` processes takes; ValueError if they cannot share it evenly."""
    batch = recipe.global_batch
    if batch % world:
        fair = max(n for n in range(1, world) if batch % n == 0)
        why = "are more than its samples" if batch < world else "cannot share it evenly"
        raise ValueError(
            f"global_batch={batch}: {world} processes {why}; start {fair}, or make it a multiple of {world}."
        )
    return batch // world


def join(recipe: Recipe, folder) -> Accelerator:
    """Meet the other processes of a run, if there are any; trackers, if the recipe asks for some, write below `folder`."""
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # a notebook trains several recipes in one process
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    half = models.compute_dtype(recipe) == torch.bfloat16
    options = {}
    if recipe.trackers:
        place = ProjectConfiguration(
            project_dir=str(folder), logging_dir=str(folder / "tensorboard")
        )
        options = dict(log_with=list(recipe.trackers), project_config=place)
    # first, because Accelerate thinks that DeepSpeed needs a GPU; and others wait while one checks a million samples
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=1))
    if sharding(recipe, started()).startswith("zero"):
        options["deepspeed_plugin"] = DeepSpeedPlugin(
            zero3_init_flag=False,
            hf_ds_config={
                "zero_optimization": {"stage": int(recipe.sharding[-1])},
                "bf16": {"enabled": half},
                "gradient_clipping": recipe.max_grad_norm,
                "gradient_accumulation_steps": 1,  # the loss is divided already, by the tokens of the global batch
                "train_micro_batch_size_per_gpu": 1,  # only reported; the plan decides
            },
        )
    else:
        options["cpu"] = not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if half else "no", **options)
    unset_hf_deepspeed_config()  # or from_pretrained would load pieces for ZeRO-3; the model is shared out later, by prepare
    return accelerator
