"""The model of vision tower, projector and language model: built, tuned, swapped and exported.

Only the room `models` knows the modules' names, bitsandbytes and peft.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import logging

from vflan.config import Recipe, replace, shown, weights_source
from vflan.data.conversation import IMAGE
from vflan.models import quantisation
from vflan.models import weights as files

# These belong to a model, so they can be imported from here too.
from vflan.models.backbones import backbone_config, shapes
from vflan.models.backbones import load_processor as load_processor
from vflan.models.backbones import picture_tokens as picture_tokens
from vflan.models.quantisation import compute_dtype
from vflan.models.tokenizer import load_tokenizer
from vflan.models.weights import Source
from vflan.models.weights import read_projector as read_projector

# A bar for each file that is read or written would fill a notebook.
logging.disable_progress_bar()

PARTS = ("vision_tower", "projector", "language_model")
# The vision tower has a q_proj too, so the pattern names the language model.
_LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def load_model(recipe: Recipe, weights: Source | None = None) -> Llava:
    """The three parts as one model in evaluation mode, on the CPU (quantised: on the GPU).

    Without `weights` it has the recipe's vision tower and language model and a fresh projector.
    weights: a Run, its folder or another Hugging Face folder of a LLaVA-1.5; a folder as LLaVA's
    own code writes it; or LLaVA's `mm_projector.bin` alone, from which the paper starts.

    ValueError if the files lack any other weight or hold it in another shape: none is ever random.
    """
    dtype = compute_dtype(recipe)
    source = None if weights is None else files.weights_path(weights)
    if source is None or source.is_file() or files.is_llava_checkpoint(source):
        model = _assemble(recipe, dtype, source)
    else:
        options = quantisation.loading_options(recipe, dtype)
        model = files.load_pretrained(Llava, source, dtype=dtype, **options)
        _check_features(model.config, source)
        # A config.json without this length, or with another tower's, would move all positions.
        vision = model.config.vision_config
        model.config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    _check_quantised(model, recipe, source)
    quantisation.keep_layout(model)
    return model.eval()


def _check_features(config: LlavaConfig, source: Path) -> None:
    """Raise ValueError if a model reads other image features than LLaVA-1.5."""
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if not isinstance(layer, int) or strategy != "default":
        raise ValueError(
            f"{shown(source)} is no LLaVA-1.5: its vision_feature_layer is {layer} and its "
            f"vision_feature_select_strategy {strategy!r}; one layer and 'default' are needed."
        )


def _check_quantised(model: nn.Module, recipe: Recipe, source: Path | None) -> None:
    """Raise ValueError unless exactly the language model's linear layers are quantised, or none."""
    linears = sum(isinstance(layer, nn.Linear) for layer in model.model.language_model.modules())
    expected = dict.fromkeys(PARTS, 0)
    expected["language_model"] = linears if recipe.bits < 16 else 0
    if (actual := quantised_layers(model)) != expected:
        raise ValueError(
            f"{shown(source) if source else recipe.language_model}: quantised layers are {actual}, "
            f"but bits={recipe.bits} means {expected}; begin from weights of 16 or 32 bits."
        )


def _assemble(recipe: Recipe, dtype: torch.dtype, source: Path | None) -> Llava:
    """A model of the recipe's backbones; the weights in LLaVA's file or folder replace theirs."""
    projector_weights, text_config = None, None
    if source is not None:
        text_config = files.llava_text_config(source) if source.is_dir() else None
        text = text_config or backbone_config(recipe.language_model)
        vision = backbone_config(recipe.vision_tower)
        projector_weights = fitting_projector(source, vision.hidden_size, text.hidden_size)
    tower = _load_tower(recipe, dtype, source)
    tokenizer = load_tokenizer(recipe)
    language_model = _load_language_model(recipe, dtype, source, text_config, len(tokenizer))
    image_token = tokenizer.convert_tokens_to_ids(IMAGE)
    config = _llava_config(tower.config, language_model.config, image_token, dtype=dtype)
    # The empty model costs no memory on the meta device; the loaded parts are put into it.
    with torch.device("meta"):
        model = Llava(config)
    # The fresh projector depends on the recipe's seed alone, not on what was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        projector = LlavaMultiModalProjector(config).to(language_model.device, dtype)
    if projector_weights is not None:
        projector.load_state_dict(projector_weights)
    model.model.multi_modal_projector = projector
    model.model.vision_tower = tower.to(language_model.device)
    model.model.language_model, model.lm_head = language_model.model, language_model.lm_head
    if recipe.bits < 16:
        model.is_quantized, model.hf_quantizer = True, language_model.hf_quantizer
        model.config.quantization_config = language_model.config.quantization_config
    model.generation_config = language_model.generation_config
    # Answers are greedy, as in the papers.
    greedy = dict(do_sample=False, temperature=None, top_p=None)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.generation_config.update(**greedy, **ends)
    if empty := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise RuntimeError(f"{recipe.language_model}: {empty[0]} was left without a value.")
    return model


def fitting_projector(source: Source, vision: int, text: int) -> dict[str, torch.Tensor]:
    """`read_projector`, or ValueError if it does not fit between backbones of these widths."""
    projector = read_projector(source)
    # linear_1 (hidden, vision) reads the vision tower, linear_2 (text, hidden) writes embeddings.
    # LLaVA-1.5's hidden width is the language model's.
    expected = {"linear_1.weight": (text, vision), "linear_1.bias": (text,)}
    expected |= {"linear_2.weight": (text, text), "linear_2.bias": (text,)}
    actual = {name: tuple(weight.shape) for name, weight in projector.items()}
    if actual != expected:
        first, second = actual["linear_1.weight"], actual["linear_2.weight"]
        raise ValueError(
            f"{shown(files.weights_path(source))} joins a tower of width {first[-1]} to a language "
            f"model of width {second[0]}, but this recipe's have {vision} and {text} (its hidden "
            f"width is {first[0]}); take the projector that was trained for them."
        )
    return projector


def _load_tower(recipe: Recipe, dtype: torch.dtype, source: Path | None) -> CLIPVisionModel:
    """The recipe's vision tower, with the weights that a folder of LLaVA's may hold for it."""
    tower = files.load_pretrained(CLIPVisionModel, weights_source(recipe.vision_tower), dtype=dtype)
    stored = {} if source is None else files.from_llava(files.read_tensors(source, "vision_tower."))
    if not stored:
        return tower
    stored = {name.removeprefix("model.vision_tower."): w for name, w in stored.items()}
    if missing := sorted(tower.state_dict().keys() - stored.keys()):
        raise ValueError(
            f"{shown(source)} holds a vision tower without {len(missing)} of its weights "
            f"({missing[0]}, ...): is a file of it missing? Copy or download all of them."
        )
    if quantisation.shapes_of(stored) != quantisation.shapes_of(tower.state_dict()):
        raise ValueError(
            f"{shown(source)} brings a vision tower that is not of {recipe.vision_tower}'s shape; "
            "name its own as vision_tower."
        )
    tower.load_state_dict(stored)
    return tower


def _load_language_model(
    recipe: Recipe, dtype: torch.dtype, source: Path | None, text_config: Any, vocabulary: int
) -> nn.Module:
    """The language model of LLaVA's folder if `text_config` is its shape, else the recipe's."""
    options = quantisation.loading_options(recipe, dtype, skip=("lm_head",))
    if text_config is None:
        source = weights_source(recipe.language_model)
    else:
        options["config"] = text_config
    model = files.load_pretrained(AutoModelForCausalLM, source, dtype=dtype, **options)
    _grow_vocabulary(model, vocabulary)
    # vLLM looks up the class by this name.
    model.config.architectures = [type(model).__name__]
    return model


def _grow_vocabulary(language_model: nn.Module, size: int) -> None:
    """Add rows for new tokens, each the mean of the old rows.

    The logit of such a token is then the mean of the old logits, so that it is never the largest.
    """
    old_size = language_model.get_input_embeddings().num_embeddings
    if size <= old_size:
        return
    language_model.resize_token_embeddings(size, mean_resizing=False)
    tables = [language_model.get_input_embeddings(), language_model.get_output_embeddings()]
    with torch.no_grad():
        for table in tables:
            table.weight[old_size:] = table.weight[:old_size].mean(dim=0)


def _llava_config(vision: Any, text: Any, image_token: int, **options: Any) -> LlavaConfig:
    # A folder of this machine tells other users nothing.
    vision._name_or_path = text._name_or_path = ""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
        **options,
    )


def meta_model(recipe: Recipe, layers: int | None = None) -> Llava:
    """The recipe's model without weights, on PyTorch's meta device, for counting and planning.

    The presets' shapes are known without a download. layers: how many of them the tower and the
    language model get, in place of all.
    """
    vision, text = shapes(recipe)
    for config in (vision, text):
        config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        return Llava(_llava_config(vision, text, text.vocab_size))


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The three parts by name, as modules that share the model's weights.

    The language model includes its output layer.
    """
    inner = model.model
    language_model = {"model": inner.language_model, "lm_head": model.lm_head}
    return {
        "vision_tower": inner.vision_tower,
        "projector": inner.multi_modal_projector,
        "language_model": nn.ModuleDict(language_model),
    }


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """How many parameters each part has; in 4 bits too, where a byte holds two of them."""

    def count(weight):
        state = getattr(weight, "quant_state", None)
        return (weight.shape if state is None else state.shape).numel()

    return {part: sum(map(count, module.parameters())) for part, module in parts(model).items()}


def quantised_layers(model: nn.Module) -> dict[str, int]:
    """How many 8- or 4-bit layers each part has."""
    return {
        part: sum(map(quantisation.is_quantised, m.modules())) for part, m in parts(model).items()
    }


def image_features(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """The projector's input: the vision tower's last layer but one, without the class token.

    pixel_values: (pictures, 3, side, side). Returns (pictures, patches, vision width). It equals
    the model's own `get_image_features` before its projector, but skips the layers above.
    """
    tower, layers = model.model.vision_tower, model.model.vision_tower.encoder.layers
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(tower.dtype)))
    # Hidden state 0 is the first layer's input, so there is one more of them than layers.
    last = range(len(layers) + 1)[model.config.vision_feature_layer]
    for layer in layers[:last]:
        hidden = layer(hidden, None)  # (pictures, 1 + patches, vision width)
    return hidden[:, 1:]


def swap_part(model: nn.Module, part: str, other: Any) -> nn.Module:
    """The model with one part's weights replaced, in place, by those of `other` (Tables 6 and 7).

    part: vision_tower, projector or language_model. other: a model or a Run; for the projector
    also LLaVA's `mm_projector.bin`; for the language model a causal language model of the same
    shape, or its folder or hub id, which need not know `<image>`. The GPU never holds two models
    in 16 bits. ValueError if the two parts differ in shape or in quantisation.
    """
    if part not in PARTS:
        raise ValueError(f"There is no part {part!r}; a model has {', '.join(PARTS)}.")
    if part == "projector" and not isinstance(other, nn.Module):
        # Its few weights are read alone, not with the rest of a second model.
        widths = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
        parts(model)[part].load_state_dict(fitting_projector(other, *widths))
        return model
    if isinstance(other, (str, os.PathLike)):
        other = _read_language_model(other, model, part)
    elif not isinstance(other, nn.Module):
        # On the CPU, unless it is quantised.
        other = load_model(other.recipe, other)
    if isinstance(other, Llava):
        source = parts(other)[part]
    elif part == "language_model":
        source = nn.ModuleDict({"model": other.model, "lm_head": other.lm_head})
    else:
        source = other
    quantisation.copy_weights(parts(model)[part], source, part)
    return model


def _read_language_model(source: str | os.PathLike, model: nn.Module, part: str) -> nn.Module:
    """A causal language model, in the precision of `model`: only what was learned may differ.

    One that was never trained with pictures lacks the row of `<image>` and gets it, as `load_model`
    gives it to the recipe's.
    """
    options, quantiser = {"dtype": model.dtype}, getattr(model, "hf_quantizer", None)
    if quantiser and part == "language_model":
        options["quantization_config"] = quantiser.quantization_config
        options["device_map"] = {"": model.device}
    other = files.load_pretrained(AutoModelForCausalLM, weights_source(str(source)), **options)
    # Any other difference in rows is another vocabulary, which cannot be swapped.
    if other.config.vocab_size == model.config.image_token_id:
        _grow_vocabulary(other, model.config.text_config.vocab_size)
    return other


def fingerprint(weights: nn.Module | Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of a module's weights, or of named tensors: equal exactly if every bit is."""
    if isinstance(weights, nn.Module):
        weights = weights.state_dict().items()
    digest = hashlib.sha256()
    for name, tensor in sorted(weights):
        # A sharded tensor (FSDP2) is hashed by this process's part.
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def freeze(model: nn.Module, recipe: Recipe) -> None:
    """Let only the recipe's parts learn, in fp32; LoRA adds adapters to the language model."""
    model.requires_grad_(False)
    if recipe.lora_r:
        from peft import inject_adapter_in_model

        # The adapters depend on the recipe's seed alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            inject_adapter_in_model(_lora_config(recipe), model)
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora_" in name)
    elif "language_model" in recipe.tune:
        parts(model)["language_model"].requires_grad_(True)
    parts(model)["projector"].requires_grad_("projector" in recipe.tune)
    # Updates are small: bf16 weights would round most of them away.
    for _, weight in _learning(model):
        weight.data = weight.data.float()


def _learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def export(
    model: nn.Module, processor: Any, recipe: Recipe, folder: Path, init: Source | None = None
) -> None:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` load on their own.

    Adapters are merged in. A quantised model is written in 16 bits: what it learned is put on the
    weights that it began with (`init`, as for `load_model`).
    """
    if recipe.bits < 16:
        learned = dict(_learning(model))
        recipe = replace(recipe, bits=16)
        model = load_model(recipe, init)
        freeze(model, recipe)
        if unknown := model.load_state_dict(learned, strict=False).unexpected_keys:
            raise RuntimeError(f"{unknown[0]} was learned but has no place in the 16-bit model.")
    if recipe.lora_r:
        _merge_adapters(model)
    # Published LLaVA-1.5 folders name the tower's weights so. transformers 5 reads both names, vLLM
    # and transformers 4 only these.
    ours, published = "model.vision_tower.", "model.vision_tower.vision_model."
    weights = model.to(compute_dtype(recipe)).state_dict()
    weights = {name.replace(ours, published, 1): weight for name, weight in weights.items()}
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


def save_adapter(model: nn.Module, recipe: Recipe, folder: Path) -> None:
    """Write what a LoRA run has learned as PEFT's files: the adapters, and the whole projector.

    Call it before `export`, which merges the adapters. `PeftModel.from_pretrained(model it began
    with, folder)` puts model and adapters together again.
    """
    # PEFT names the model below its own wrapper, and leaves out the adapter's name.
    learned = {name.replace(".default", ""): weight for name, weight in _learning(model)}
    if not any("lora_" in name for name in learned):
        raise ValueError("The model has no adapters, or they are merged already: save them before.")
    folder.mkdir(parents=True, exist_ok=True)
    stored = {f"base_model.model.{name}": w.detach().cpu() for name, w in learned.items()}
    stored = {name: weight.contiguous() for name, weight in stored.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    whole = ["multi_modal_projector"] if "projector" in recipe.tune else None
    _lora_config(recipe, modules_to_save=whole, inference_mode=True).save_pretrained(folder)


def _lora_config(recipe: Recipe, **options: Any) -> Any:
    from peft import LoraConfig

    values = dict(r=recipe.lora_r, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout)
    return LoraConfig(**values, target_modules=_LORA_TARGETS, **options)


def _merge_adapters(model: nn.Module) -> None:
    """Add the adapters to the weights that they adapt, and put the plain layers back."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    # save_pretrained would write the adapters alone if it still saw them.
    model.peft_config, model._hf_peft_config_loaded = {}, False
