"""The recipe's two backbones: their shapes, and the preparation of pictures for them."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vflan.config import Recipe, weights_source
from vflan.data.conversation import IMAGE, chat_template
from vflan.models.tokenizer import load_tokenizer
from vflan.models.weights import read_pretrained

# The shapes of the presets' backbones, so that a run can be planned without a download.
_VICUNA = dict(vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5)
_VICUNA_7B = _VICUNA | dict(hidden_size=4096, intermediate_size=11008)
_VICUNA_7B |= dict(num_hidden_layers=32, num_attention_heads=32)
_VICUNA_13B = _VICUNA | dict(hidden_size=5120, intermediate_size=13824)
_VICUNA_13B |= dict(num_hidden_layers=40, num_attention_heads=40)
_CLIP_L = dict(hidden_size=1024, intermediate_size=4096, image_size=336, patch_size=14)
_CLIP_L |= dict(num_hidden_layers=24, num_attention_heads=16)
_CLIP_B = dict(hidden_size=768, intermediate_size=3072, image_size=224, patch_size=16)
_CLIP_B |= dict(num_hidden_layers=12, num_attention_heads=12)
_SMOL = dict(vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5)
_SMOL |= dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
_SMOL |= dict(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
_KNOWN_SHAPES = {
    "lmsys/vicuna-7b-v1.5": (LlamaConfig, _VICUNA_7B),
    "lmsys/vicuna-13b-v1.5": (LlamaConfig, _VICUNA_13B),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (LlamaConfig, _SMOL),
    "openai/clip-vit-large-patch14-336": (CLIPVisionConfig, _CLIP_L),
    "openai/clip-vit-base-patch16": (CLIPVisionConfig, _CLIP_B),
}


def backbone_config(backbone: str) -> Any:
    """The configuration of a folder or hub id; of a whole CLIP that of its picture side."""
    source = weights_source(backbone)
    if source in _KNOWN_SHAPES:
        config_class, values = _KNOWN_SHAPES[source]
        return config_class(**values)
    try:
        config = read_pretrained(AutoConfig, source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{backbone}: no config.json could be read there ({error})") from None
    return getattr(config, "vision_config", config)


def shapes(recipe: Recipe) -> tuple[CLIPVisionConfig, LlamaConfig]:
    """The configurations of vision tower and language model; no download for the presets."""
    return backbone_config(recipe.vision_tower), backbone_config(recipe.language_model)


def picture_tokens(recipe: Recipe) -> int:
    """Positions of a picture in the language model: one for each patch of the vision tower."""
    vision = backbone_config(recipe.vision_tower)
    return (vision.image_size // vision.patch_size) ** 2


def load_processor(recipe: Recipe, model: Any = None) -> LlavaProcessor:
    """Tokenizer and preparation of pictures, always by Pillow.

    `pad` puts a picture on a square of CLIP's mean colour, `crop` takes the centre (LLaVA-1.5).
    ValueError if `model` was made for other backbones.
    """
    tokenizer, vision = load_tokenizer(recipe), backbone_config(recipe.vision_tower)
    clip = read_pretrained(CLIPImageProcessorPil, weights_source(recipe.vision_tower)).to_dict()
    names = "size crop_size resample image_mean image_std rescale_factor".split()
    names += ["do_normalize", "do_center_crop"]
    values = {name: clip[name] for name in names if name in clip}
    pictures = LlavaImageProcessorPil(**values, do_pad=recipe.image_aspect_ratio == "pad")
    if (height := pictures.crop_size["height"]) != vision.image_size:
        raise ValueError(
            f"{recipe.vision_tower}: it looks at {vision.image_size} pixels a side, but its "
            f"preprocessor_config.json prepares {height}; take both files from one place."
        )
    if model is not None:
        _check_backbones(model.config, tokenizer.convert_tokens_to_ids(IMAGE), recipe)
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        # CLIP's class token, which "default" drops again.
        num_additional_image_tokens=1,
        chat_template=chat_template(tokenizer),
    )


def _check_backbones(config: LlavaConfig, image_token: int, recipe: Recipe) -> None:
    """Raise ValueError if a model's config does not fit the recipe's backbones."""
    vision, text = shapes(recipe)
    pairs = {
        "picture's side": (config.vision_config.image_size, vision.image_size),
        "patch size": (config.vision_config.patch_size, vision.patch_size),
        "language model's width": (config.text_config.hidden_size, text.hidden_size),
        "language model's depth": (config.text_config.num_hidden_layers, text.num_hidden_layers),
        f"id of {IMAGE}": (config.image_token_id, image_token),
    }
    wrong = [f"{what} is {ours}, not {its}" for what, (ours, its) in pairs.items() if ours != its]
    if wrong:
        raise ValueError(
            f"The weights to start from are not of {recipe.vision_tower} and "
            f"{recipe.language_model}: the {' and the '.join(wrong)}; "
            "name the backbones that they were trained with."
        )
