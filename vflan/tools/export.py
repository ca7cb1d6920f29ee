"""A run for others: a folder for Hugging Face's pipeline and for vLLM, and an upload to the hub."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants, errors, get_token

from vflan.config import output_path, read_json, write_json
from vflan.escape import for_terminal
from vflan.io import whole_folder
from vflan.models.weights import check_files
from vflan.tools.cards import model_card, write_dataset_card

if TYPE_CHECKING:
    from vflan.training.run import Run


def export_run(run: Run, folder: str | os.PathLike, merge: bool = True) -> Path:
    """`Run.export`: write model (or adapter), processor, README.md and data/README.md to `folder`.

    merge: one model with the LoRA weights merged in; False writes the adapter alone.
    Raises FileExistsError if the folder is not empty, ValueError if there is no adapter.
    """
    folder = _write(run, output_path(folder), merge, Path(folder).name)
    if merge:
        print(for_terminal(serve_command(folder)))
    else:
        print(for_terminal(f"The adapter of {run.name}; it belongs on {_base_of(run)[1]}."))
    return folder


def push_run(run: Run, repo: str, private: bool = True, merge: bool = True) -> str:
    """`Run.push`: upload a run as one commit to the hub, or to the mirror that HF_ENDPOINT names.

    repo: user/name. Returns the address of its page. Raises ValueError for another form of name,
    PermissionError without a token that may write, ConnectionError if the hub refuses or is away.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"{repo!r}: the hub needs user/name.")
    if not get_token():
        raise PermissionError(
            "The hub needs a token that may write: set HF_TOKEN, or run `hf auth login`."
        )
    api = HfApi(endpoint=(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/"))
    with tempfile.TemporaryDirectory(dir=run.folder, prefix=".push-") as scratch:
        folder = _write(run, Path(scratch) / "folder", merge, repo, copy=_link_or_copy)
        try:
            page = api.create_repo(repo, private=private, exist_ok=True)
            message = f"{run.name}, by vflan"
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
            raise _hub_error(error, api.endpoint, repo) from None
    if merge:
        print(serve_command(repo, context_length(run.folder / "model")))
    else:
        print(f"The adapter is at {page}.")
    return str(page)


def context_length(folder: Path) -> int:
    """The most tokens, the picture's included, that the language model in a folder can read."""
    return read_json(Path(folder) / "config.json")["text_config"]["max_position_embeddings"]


def serve_command(model: str | os.PathLike, length: int | None = None) -> str:
    """The command that serves an exported folder or a hub id with vLLM, for `vflan.ServedModel`.

    length: the most tokens of a conversation; default: what the model in the folder can read.
    The chat template loops over the parts of a message, which is vLLM's format `openai`. One
    picture a conversation is allowed, as in training.
    """
    options = {
        "--served-model-name": Path(model).name,
        "--limit-mm-per-prompt": '{"image": 1}',
        "--max-model-len": str(length or context_length(model)),
        "--chat-template-content-format": "openai",
    }
    words = [word for option in options.items() for word in option]
    return shlex.join(["vllm", "serve", str(model), *words])


def _write(run, folder, merge, name, copy=shutil.copy2):
    """Write an exported run to `folder`, whole or not at all; `name` is how its card calls it."""
    source = run.folder / ("model" if merge else "adapter")
    if not merge and not source.is_dir():
        no_lora, too_old = "it was not tuned with LoRA", "an earlier version of vflan kept none"
        reason = too_old if run.recipe.lora_r else no_lora
        raise ValueError(f"{run.name} has no adapter: {reason}; export it with merge=True.")
    check_files(source)
    with whole_folder(folder, folder.with_name(f".{folder.name}.part")) as part:
        shutil.copytree(source, part, copy_function=copy, dirs_exist_ok=True)
        processor = run.processor()
        processor.save_pretrained(part)
        # preprocessor_config.json, for transformers 4 and vLLM
        processor.image_processor.save_pretrained(part)
        also_for_transformers_4(part)
        if not merge:
            path = part / "adapter_config.json"
            write_json(path, read_json(path) | dict(base_model_name_or_path=_base_of(run)[0]))
        write_dataset_card(run, part / "data")
        model_card(run, name, merge).save(part / "README.md")
    return folder


def _base_of(run):
    """What an adapter belongs on: the folder of a model, None for bare backbones; and in words."""
    record = read_json(run.folder / "init.json")
    init, parts = record.get("init"), record.get("init_weights") or {}
    # Of weights that are no run's, only the projector is taken.
    if init and parts.keys() == {"projector"}:
        return None, f"its bare backbones with the projector of {init}"
    return init and f"{init}/model", init or "its bare backbones"


def also_for_transformers_4(folder: Path) -> None:
    """Write the settings that transformers 5 renamed under names that 4 and 5 both read.

    Version 4 raises an error for the class of a tokenizer that it does not know and for a list of
    special tokens; other settings that it does not find would silently have its defaults.
    """
    path = folder / "tokenizer_config.json"
    tokenizer = read_json(path)
    if tokenizer["tokenizer_class"] == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        # that class of version 4 would also return token types, which no Llama takes
        tokenizer["model_input_names"] = ["input_ids", "attention_mask"]
    if tokens := tokenizer.pop("extra_special_tokens", None):
        tokenizer["additional_special_tokens"] = tokens
    if named := tokenizer.pop("model_specific_special_tokens", None):
        tokenizer["extra_special_tokens"] = named
    write_json(path, tokenizer)
    # the folder of an adapter has no configuration of a model
    path = folder / "config.json"
    if config := read_json(path):
        text = config["text_config"]
        rotary = dict(text.get("rope_parameters") or {})
        text["rope_theta"] = rotary.pop("rope_theta", 10000.0)
        text["rope_scaling"] = rotary if rotary.get("rope_type", "default") != "default" else None
        write_json(path, config)


def _link_or_copy(source, target):
    """Weights are only read and may have 27 GB: an upload needs no copy of them."""
    if Path(source).suffix == ".safetensors":
        try:
            return os.link(source, target)
        except OSError:  # a file system without hard links
            pass
    return shutil.copy2(source, target)


def _hub_error(error, endpoint, repo):
    """What went wrong on the way to the hub, in one sentence with what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return PermissionError(f"{endpoint} does not let this token write to {repo}.")
    reason = str(error).strip().split("\n")[0]
    return ConnectionError(f"{endpoint} cannot be reached, or refused ({reason}); push again.")
