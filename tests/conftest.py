"""Fixtures: tiny random backbones and coloured squares, made in a second and without network."""

import atexit
import json
import os
import shutil
import tempfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

# Spinning OpenMP threads make busy machines ten times slower, and the children that some tests fork
# would wait forever for threads that only their parent has.
os.environ["OMP_NUM_THREADS"] = "1"
# The tests leave nothing in data/cache.
os.environ["VFLAN_CACHE"] = tempfile.mkdtemp(prefix="vflan-cache-")

import pytest
from filelock import FileLock
from PIL import Image

atexit.register(shutil.rmtree, os.environ["VFLAN_CACHE"], ignore_errors=True)
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
COLOURS = ["red", "green", "blue", "yellow"]
# Several processes run one file each. With the longest at the end, all others would wait for it.
LONGEST = (
    *("test_notebooks.py", "test_distributed.py", "test_real_notebooks.py", "test_setup.py"),
    *("test_notebook_files.py", "test_batching.py", "test_memory.py", "test_evaluator.py"),
    *("test_resume.py", "test_broken_disks.py", "test_sweeps.py", "test_validation.py"),
)


def pytest_collection_modifyitems(items):
    """The longest files first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def shared():
    """A folder beside the repository with reference data that may not be published.

    Tests that need it are skipped without it.
    """
    if not SHARED.is_dir():
        pytest.skip(f"needs the folder {SHARED.name} beside the repository")
    return SHARED


@pytest.fixture
def alone(tmp_path_factory):
    """For tests that start two training processes: only one of them runs at a time."""
    # With pytest-xdist, this is the folder that all workers of one run share.
    with FileLock(tmp_path_factory.getbasetemp().parent / "two_processes.lock"):
        yield


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """Folders of a random CLIP tower and a random Llama with byte-fallback BPE, by Recipe field."""
    folder = tmp_path_factory.mktemp("backbones")
    make_backbones(folder)
    return {
        "vision_tower": str(folder / "vision_tower"),
        "language_model": str(folder / "language_model"),
    }


def make_backbones(folder, width=32, layers=2, seed=0):
    import torch
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    from vflan.data.conversation import SYSTEM

    text = [
        SYSTEM,
        "USER: ASSISTANT:",
        "Describe the image. What color is it? a red green blue yellow square on grey.",
    ] * 20
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", "<image>", *bytes_]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    state = json.loads(tokenizer.to_str())  # the byte tokens are vocabulary, not special tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in bytes_]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([AddedToken(SYSTEM, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=24,
                patch_size=12,
            )
        )
        language = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(fast),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    tower.save_pretrained(folder / "vision_tower")
    CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    ).save_pretrained(folder / "vision_tower")
    language.save_pretrained(folder / "language_model")
    fast.save_pretrained(folder / "language_model")


def serve(handler):
    """(server, its address): a local HTTP server in the background that logs nothing."""
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def squares(tmp_path):
    """The samples file of 32 coloured squares; their pictures are in `images` beside it."""
    return make_squares(tmp_path)


def make_squares(folder, rows=32):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(rows):
        colour = COLOURS[i % len(COLOURS)]
        Image.new("RGB", (30, 20), colour).save(folder / "images" / f"{i}.png")
        turns = [
            {
                "from": "human",
                "value": ["<image>\nWhat color is it?", "Describe the image.\n<image>"][i % 2],
            },
            {"from": "gpt", "value": f"a {colour} square"},
        ]
        samples.append(
            {
                "id": f"s{i}",
                "image": f"{i}.png",
                "task_name": f"task{i % 8}",
                "conversations": turns,
            }
        )
    path = folder / "samples.json"
    path.write_text(json.dumps(samples))
    return path


@pytest.fixture
def recipe(backbones, squares, tmp_path):
    """A small recipe over the squares; its runs go to a temporary folder."""
    from vflan.config import Recipe

    return Recipe(
        name="base",
        stage="base",
        samples=str(squares),
        images=str(squares.parent / "images"),
        runs=str(tmp_path / "runs"),
        tune=("projector", "language_model"),
        lr=1e-2,
        global_batch=8,
        micro_batch=4,
        **backbones,
    )
