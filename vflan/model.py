"""The model: vision tower, projector, language model. The only file that knows module names, bitsandbytes and peft."""

import hashlib
import os
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import logging

from vflan.conversation import CHAT_TEMPLATE, IMAGE
from vflan.recipe import replace, resolve, weights_source

logging.disable_progress_bar()  # a bar for each file read or written drowns a notebook

PARTS = ("vision_tower", "projector", "language_model")
# bitsandbytes matches these from the START of a name (or as a suffix): "vision_tower" alone would skip nothing
_NOT_QUANTISED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
_LORA_TARGETS = (
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"  # not the tower's q_proj
)


def load_model(recipe, weights=None) -> LlavaForConditionalGeneration:
    """The three parts as one `LlavaForConditionalGeneration`, in evaluation mode, on the CPU (quantised: on the GPU).

    From the recipe's vision tower and language model with a fresh projector; or, with `weights` (a Run or its folder),
    as that run left it. Any other weight that the files lack is an error, never a random guess.
    """
    dtype = compute_dtype(recipe)
    if weights is not None:
        folder = model_folder(weights)
        model, info = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **_quantised(recipe, dtype)
        )
        _nothing_random(info, folder)
        return model.eval()
    tower_from, language_from = weights_source(recipe.vision_tower), weights_source(recipe.language_model)
    tower, info = CLIPVisionModel.from_pretrained(tower_from, dtype=dtype, output_loading_info=True)
    _nothing_random(info, recipe.vision_tower)
    language_model, info = AutoModelForCausalLM.from_pretrained(
        language_from, dtype=dtype, output_loading_info=True, **_quantised(recipe, dtype, skip=["lm_head"])
    )
    _nothing_random(info, recipe.language_model)
    tokenizer = load_tokenizer(recipe)
    _grow_vocabulary(language_model, len(tokenizer))
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
        dtype=dtype,
    )
    with torch.device("meta"):  # the shell costs no memory; the loaded parts are put into it
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(language_model.device, dtype)
    model.model.vision_tower = tower.to(language_model.device)
    model.model.language_model, model.lm_head = language_model.model, language_model.lm_head
    if recipe.bits < 16:
        model.is_quantized, model.hf_quantizer = True, language_model.hf_quantizer
        model.config.quantization_config = language_model.config.quantization_config
    model.generation_config = language_model.generation_config
    model.generation_config.update(
        do_sample=False,
        temperature=None,
        top_p=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert not any(p.is_meta for p in model.parameters()), "a weight was left without a value"
    return model.eval()


def load_tokenizer(recipe):
    """The language model's tokenizer, with `<image>` and a padding token in it (the unknown token pads, as in LLaVA)."""
    tokenizer = AutoTokenizer.from_pretrained(weights_source(recipe.language_model))
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{recipe.language_model}: its tokenizer has no end token, so no answer could ever end.")
    return tokenizer


def load_processor(recipe) -> LlavaProcessor:
    """Tokenizer and picture preparation (`pad`: on a square of CLIP's mean colour; `crop`: the centre), always by Pillow."""
    tokenizer, folder = load_tokenizer(recipe), weights_source(recipe.vision_tower)
    clip = CLIPImageProcessorPil.from_pretrained(folder).to_dict()
    wanted = (
        "size",
        "crop_size",
        "resample",
        "image_mean",
        "image_std",
        "rescale_factor",
        "do_normalize",
        "do_center_crop",
    )
    pictures = LlavaImageProcessorPil(
        **{k: clip[k] for k in wanted if k in clip}, do_pad=recipe.image_aspect_ratio == "pad"
    )
    vision = AutoConfig.from_pretrained(folder)
    vision = getattr(vision, "vision_config", vision)  # a whole CLIP brings its text side too
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def parts(model) -> dict[str, nn.Module]:
    """The three parts by name, as modules that share the model's weights. The language model includes its output layer."""
    inner = model.model
    return {
        "vision_tower": inner.vision_tower,
        "projector": inner.multi_modal_projector,
        "language_model": nn.ModuleDict({"model": inner.language_model, "lm_head": model.lm_head}),
    }


def swap_part(model, part: str, other):
    """The model with one part's weights replaced, in place, by those of `other` (Tables 6 and 7).

    `other`: a model, a Run, or (for the language model) a causal language model of the same shape.
    """
    if part not in PARTS:
        raise ValueError(f"There is no part {part!r}; a model has {', '.join(PARTS)}.")
    other = other if isinstance(other, nn.Module) else other.load_model()
    if isinstance(other, LlavaForConditionalGeneration):
        source = parts(other)[part]
    else:
        source = nn.ModuleDict({"model": other.model, "lm_head": other.lm_head}) if part == "language_model" else other
    mine, theirs = parts(model)[part].state_dict(), source.state_dict()
    odd = [
        name
        for name in {**mine, **theirs}
        if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape
    ]
    if odd:
        raise ValueError(
            f"The two {part}s differ in shape ({odd[0]} and {len(odd) - 1} more), so they cannot be swapped."
        )
    parts(model)[part].load_state_dict(theirs)
    return model


def freeze(model, recipe) -> None:
    """Let only the recipe's parts learn, in fp32 (LoRA: adapters in place of the language model); the rest stands still."""
    model.requires_grad_(False)
    if recipe.lora_r:
        from peft import LoraConfig, inject_adapter_in_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            config = LoraConfig(
                r=recipe.lora_r,
                lora_alpha=recipe.lora_alpha,
                lora_dropout=recipe.lora_dropout,
                target_modules=_LORA_TARGETS,
            )
            inject_adapter_in_model(config, model)
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora_" in name)
    elif "language_model" in recipe.tune:
        parts(model)["language_model"].requires_grad_(True)
    parts(model)["projector"].requires_grad_("projector" in recipe.tune)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if recipe.bits == 4:
        from bitsandbytes.nn import Linear4bit

        odd = [
            name
            for name, module in model.named_modules()
            if isinstance(module, Linear4bit) and "language_model" not in name
        ]
        assert not odd, f"{odd[0]} was quantised; only the language model may be"


def fingerprint(weights) -> str:
    """A hash of named weights (a module, or pairs of name and tensor): equal exactly when every bit is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.state_dict().items() if isinstance(weights, nn.Module) else weights):
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def shard(learner, recipe) -> None:
    """Spread weights, gradients and optimiser of a fully tuned model over the processes, in place (PyTorch's FSDP2)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = compute_dtype(recipe) == torch.bfloat16
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    )
    for layer in learner.model.model.language_model.layers:
        fully_shard(layer, mp_policy=policy)
    # the tower is small, frozen, and used outside of the learner's forward: every process keeps it whole
    fully_shard(learner, mp_policy=policy, ignored_params=set(parts(learner.model)["vision_tower"].parameters()))


def image_features(model, pixel_values):
    """What the projector reads: (pictures, patches, width) from the tower's last layer but one, class token dropped.

    Equal to the model's own `get_image_features` before its projector, without computing the layers above.
    """
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(tower.dtype)))
    for layer in tower.encoder.layers[: model.config.vision_feature_layer + 1]:
        hidden = layer(hidden, None)
    return hidden[:, 1:]


def export(model, processor, recipe, folder, init=None) -> None:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` load on their own; adapters are merged in.

    A quantised model is written in 16 bits: what it learned is put on the weights it began with (`init`, as for
    `load_model`).
    """
    if recipe.bits < 16:
        learned = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        whole = replace(recipe, bits=16)
        model = load_model(whole, init)
        freeze(model, whole)
        unknown = model.load_state_dict(learned, strict=False).unexpected_keys
        assert not unknown, f"{unknown[0]} was learned but has no place in the 16-bit model"
    if recipe.lora_r:
        _merge_adapters(model)
    model.to(compute_dtype(recipe)).save_pretrained(folder)
    processor.save_pretrained(folder)


def model_folder(weights) -> Path:
    """The Hugging Face folder of a Run, a run folder, or such a folder itself."""
    folder = resolve(getattr(weights, "folder", weights))
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model; train that run first.")
    return folder


def compute_dtype(recipe) -> torch.dtype:
    """bf16 only where it is fast: on a CPU everything runs in fp32."""
    return torch.bfloat16 if recipe.precision == "bf16" and torch.cuda.is_available() else torch.float32


def _quantised(recipe, dtype, skip=_NOT_QUANTISED) -> dict:
    if recipe.bits == 16:
        return {}
    from transformers import BitsAndBytesConfig

    if recipe.bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip))
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(skip),
        )
    return {"quantization_config": config, "device_map": {"": _device()}}


def _device():
    return int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"


def _merge_adapters(model) -> None:
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    model.peft_config, model._hf_peft_config_loaded = {}, False


def _nothing_random(info: dict, source) -> None:
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights ({missing[0]}, ...); they would have been random. Is it the right folder?"
        )


def _grow_vocabulary(language_model, size: int) -> None:
    """Rows for added tokens, each the mean of the old rows: their logit is then a mean too and is never the largest."""
    old = language_model.get_input_embeddings().num_embeddings
    if size <= old:
        return
    language_model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for table in (language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight):
            table[old:] = table[:old].mean(dim=0)
