"""A model that vflan did not train: a LLaVA-1.5 of the hub, or in a folder of anybody's.

`vflan.evaluate("llava-hf/llava-1.5-7b-hf")` asks it the same questions as a run of ours, with the
processor and the chat template that come with it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vflan.config import Recipe, output_path, preset, replace, resolve, shown

if TYPE_CHECKING:
    from torch import nn
    from transformers import LlavaProcessor


@dataclass(frozen=True)
class ReleasedModel:
    """A Hugging Face folder of a LLaVA, one in LLaVA's own layout, or a hub id.

    It has what `evaluate` needs of a Run. Answers and scores go to runs/released/NAME.
    """

    source: str

    @property
    def name(self) -> str:
        """The hub id or the folder's name, with dashes for what a file name may not hold."""
        source = self.source
        name = resolve(source).name if resolve(source).is_dir() else source
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")

    @property
    def folder(self) -> Path:
        """Where its answers and scores are written."""
        return output_path(f"runs/released/{self.name}")

    @cached_property
    def weights(self) -> Path:
        """The folder with its files. A hub id is downloaded to the hub's cache."""
        from vflan.models.weights import weights_path

        return weights_path(self.source)

    @property
    def recipe(self) -> Recipe:
        """A recipe with the model's backbones, its name, and the default folder of benchmarks."""
        config = json.loads((self.weights / "config.json").read_text(encoding="utf-8"))
        # LLaVA's own layout names its vision tower and holds the language model's tokenizer.
        tower = config.get("mm_vision_tower") or str(self.weights)
        aspect = "pad" if config.get("image_aspect_ratio") == "pad" else "crop"
        options = dict(vision_tower=tower, language_model=str(self.weights))
        options |= dict(image_aspect_ratio=aspect, seed=0)
        return replace(preset("full_7b").base, name=self.name[:100], **options)

    @property
    def template(self) -> str:
        """`vicuna_v1`, or `own` if the model's chat template is not Vicuna's."""
        tokenizer = self.processor().tokenizer
        if not tokenizer.chat_template:
            return "vicuna_v1"
        content = [{"type": "image"}, {"type": "text", "text": "What?"}]
        turn = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        vicuna = "USER:" in prompt and prompt.rstrip().endswith("ASSISTANT:")
        return "vicuna_v1" if vicuna else "own"

    def load_model(self) -> nn.Module:
        """The model, on the GPU if there is one."""
        import torch

        from vflan.models.llava import load_model

        model = load_model(self.recipe, self.weights)
        return model.to("cuda") if torch.cuda.is_available() else model

    def processor(self) -> LlavaProcessor:
        """The processor that comes with it, or LLaVA-1.5's for a folder in LLaVA's own layout."""
        from transformers import AutoProcessor

        from vflan.models.backbones import load_processor
        from vflan.models.tokenizer import merge_by_score
        from vflan.models.weights import is_llava_checkpoint, read_pretrained

        if is_llava_checkpoint(self.weights):
            return load_processor(self.recipe)
        processor = read_pretrained(AutoProcessor, self.weights, backend="pil")
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise ValueError(f"{shown(self.weights)} has no processor for pictures and text.")
        merge_by_score(processor.tokenizer)
        # Released processors keep the template beside the tokenizer, not in it.
        processor.tokenizer.chat_template = processor.chat_template
        return processor
