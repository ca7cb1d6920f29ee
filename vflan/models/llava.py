"""The model: vision tower, projector, language model. The only file that knows module names, bitsandbytes and peft."""

import copy
import hashlib
import json
import os
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import logging

from vflan.config import replace, resolve, shown, weights_source
from vflan.data.conversation import IMAGE, chat_template
from vflan.models.tokenizer import merge_by_score

logging.disable_progress_bar()  # a bar for each file read or written drowns a notebook

PARTS = ("vision_tower", "projector", "language_model")
# bitsandbytes matches these from the START of a name (or as a suffix): "vision_tower" alone would skip nothing
_NOT_QUANTISED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
_LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"  # not the tower's q_proj
_VICUNA = dict(vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5)
_VICUNA_7B = dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
_VICUNA_13B = dict(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)
_CLIP_L = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
)
_KNOWN = {  # the shapes behind the presets' hub ids, so that a run can be planned without a download
    "lmsys/vicuna-7b-v1.5": (LlamaConfig, _VICUNA | _VICUNA_7B),
    "lmsys/vicuna-13b-v1.5": (LlamaConfig, _VICUNA | _VICUNA_13B),
    "openai/clip-vit-large-patch14-336": (
        CLIPVisionConfig,
        _CLIP_L | dict(image_size=336, patch_size=14),
    ),
}
_LLAVA_NAMES = (  # LLaVA's own names (its LlavaLlamaForCausalLM) and those of LlavaForConditionalGeneration
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
)
_LLAVA_1_5 = dict(  # what LLaVA's config.json must not contradict
    mm_projector_type="mlp2x_gelu",
    mm_vision_select_layer=-2,
    mm_vision_select_feature="patch",
    mm_use_im_start_end=False,
    mm_patch_merge_type="flat",
)


def load_model(recipe, weights=None) -> LlavaForConditionalGeneration:
    """The three parts as one `LlavaForConditionalGeneration`, in evaluation mode, on the CPU (quantised: on the GPU).

    From the recipe's vision tower and language model with a fresh projector; or, with `weights`, as those left it: a Run,
    its folder or another Hugging Face folder of a LLaVA-1.5, a folder as LLaVA's own code writes it, or LLaVA's
    `mm_projector.bin` alone, from which the paper starts. Any other weight that the files lack or hold in another shape
    is an error, never a random guess.
    """
    dtype = compute_dtype(recipe)
    source = None if weights is None else _source(weights)
    if source is None or source.is_file() or _is_llavas(source):
        model = _assemble(recipe, dtype, source)
    else:
        model = _load(
            LlavaForConditionalGeneration, source, dtype=dtype, **_quantised(recipe, dtype)
        )
        config = model.config
        if (
            not isinstance(config.vision_feature_layer, int)
            or config.vision_feature_select_strategy != "default"
        ):
            raise ValueError(
                f"{shown(source)} is no LLaVA-1.5: its vision_feature_layer is {config.vision_feature_layer} and its "
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r}; one layer and 'default' are needed."
            )
    linears = sum(isinstance(layer, nn.Linear) for layer in model.model.language_model.modules())
    wanted = dict.fromkeys(PARTS, 0) | dict(language_model=linears if recipe.bits < 16 else 0)
    if (found := quantised_layers(model)) != wanted:
        raise ValueError(
            f"{shown(source) if source else recipe.language_model}: quantised layers are {found}, but bits={recipe.bits} means {wanted}; "
            "begin from weights of 16 or 32 bits."
        )
    _keep_layout(model)
    return model.eval()


def _assemble(recipe, dtype, source):
    """A model of the recipe's backbones, with what LLaVA's file or folder `source` holds in place of theirs."""
    projector, of_source = None, {}
    if source is not None:
        projector, of_source = read_projector(source), _llavas_text_config(source)
        text = of_source.get("config") or _config(recipe.language_model)
        have = projector["linear_1.weight"].shape[1], projector["linear_2.weight"].shape[0]
        want = _config(recipe.vision_tower).hidden_size, text.hidden_size
        if have != want:
            raise ValueError(
                f"{shown(source)} joins a tower of width {have[0]} to a language model of width {have[1]}, but this recipe's "
                f"have {want[0]} and {want[1]}; take the projector that was trained for them."
            )
    tower = _load(CLIPVisionModel, weights_source(recipe.vision_tower), dtype=dtype)
    if source is not None and (theirs := _stored(source, "vision_tower.")):
        theirs = {
            name.removeprefix("model.vision_tower."): weight
            for name, weight in from_llava(theirs).items()
        }
        if {name: w.shape for name, w in theirs.items()} != {
            name: w.shape for name, w in tower.state_dict().items()
        }:
            raise ValueError(
                f"{shown(source)} brings a vision tower that is not of {recipe.vision_tower}'s shape; name its own as vision_tower."
            )
        tower.load_state_dict(theirs)
    language_from = source if of_source else weights_source(recipe.language_model)
    options = _quantised(recipe, dtype, skip=["lm_head"]) | of_source
    language_model = _load(AutoModelForCausalLM, language_from, dtype=dtype, **options)
    tokenizer = load_tokenizer(recipe)
    _grow_vocabulary(language_model, len(tokenizer))
    language_model.config.architectures = [
        type(language_model).__name__
    ]  # vLLM looks the class up by it
    config = _llava_config(
        tower.config, language_model.config, tokenizer.convert_tokens_to_ids(IMAGE), dtype=dtype
    )
    with torch.device("meta"):  # the shell costs no memory; the loaded parts are put into it
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(
            language_model.device, dtype
        )
    if projector is not None:
        parts(model)["projector"].load_state_dict(projector)
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
    return model


def shapes(recipe) -> tuple[CLIPVisionConfig, LlamaConfig]:
    """The configurations of the recipe's vision tower and language model, without a download for the presets' ones."""
    return _config(recipe.vision_tower), _config(recipe.language_model)


def meta_model(recipe, layers: int | None = None) -> LlavaForConditionalGeneration:
    """The recipe's model without any weight (on PyTorch's meta device), for counting and planning; the presets' shapes
    are known without a download. With `layers` tower and language model have only so many."""
    vision, text = shapes(recipe)
    for config in (vision, text):
        config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        return LlavaForConditionalGeneration(_llava_config(vision, text, text.vocab_size))


def parameter_counts(model) -> dict[str, int]:
    """How many parameters each part has (in 4 bits two of them count as one)."""
    return {
        part: sum(weight.numel() for weight in module.parameters())
        for part, module in parts(model).items()
    }


def quantised_layers(model) -> dict[str, int]:
    """How many 8- or 4-bit layers each part has; looked up by name, for bitsandbytes is imported only where it is used."""
    named = parts(model).items()
    return {part: sum(map(_is_quantised, module.modules())) for part, module in named}


def _is_quantised(layer) -> bool:
    return type(layer).__name__ in ("Linear8bitLt", "Linear4bit")


def picture_tokens(recipe) -> int:
    """How many positions a picture takes in the language model: one for each patch of the recipe's vision tower."""
    vision = _config(recipe.vision_tower)
    return (vision.image_size // vision.patch_size) ** 2


def load_tokenizer(recipe):
    """The language model's tokenizer, with `<image>` and a padding token in it (the unknown token pads, as in LLaVA)."""
    tokenizer = merge_by_score(
        read_pretrained(AutoTokenizer, weights_source(recipe.language_model))
    )
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if hasattr(
        tokenizer, "legacy"
    ):  # a Llama's: how it spells the text after an end token; a saved copy would forget it
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{recipe.language_model}: its tokenizer has no end token, so no answer could ever end."
        )
    return tokenizer


def load_processor(recipe, model=None) -> LlavaProcessor:
    """Tokenizer and picture preparation (`pad`: on a square of CLIP's mean colour; `crop`: the centre), always by Pillow.

    A `model` that was made for other ones is an error.
    """
    tokenizer, vision = load_tokenizer(recipe), _config(recipe.vision_tower)
    clip = read_pretrained(CLIPImageProcessorPil, weights_source(recipe.vision_tower)).to_dict()
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
    if pictures.crop_size["height"] != vision.image_size:
        raise ValueError(
            f"{recipe.vision_tower}: it looks at {vision.image_size} pixels a side, but its preprocessor_config.json "
            f"prepares {pictures.crop_size['height']}; take both files from one place."
        )
    if model is not None:
        text = _config(recipe.language_model)
        theirs, inner = model.config, model.config.text_config
        pairs = {
            "picture's side": (theirs.vision_config.image_size, vision.image_size),
            "patch size": (theirs.vision_config.patch_size, vision.patch_size),
            "language model's width": (inner.hidden_size, text.hidden_size),
            "language model's depth": (inner.num_hidden_layers, text.num_hidden_layers),
            f"id of {IMAGE}": (theirs.image_token_id, tokenizer.convert_tokens_to_ids(IMAGE)),
        }
        odd = [f"{what} is {a}, not {b}" for what, (a, b) in pairs.items() if a != b]
        if odd:
            raise ValueError(
                f"The weights to start from are not of {recipe.vision_tower} and {recipe.language_model}: "
                f"the {' and the '.join(odd)}; name the backbones that they were trained with."
            )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
        chat_template=chat_template(tokenizer),
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

    `other`: a model, a Run, or (for the language model) a causal language model of the same shape, or its folder or hub id.
    """
    if part not in PARTS:
        raise ValueError(f"There is no part {part!r}; a model has {', '.join(PARTS)}.")
    if isinstance(other, (str, os.PathLike)):
        # quantised as the model is, so that the two differ in what was learned and in nothing else
        options, quantiser = {"dtype": torch.float32}, getattr(model, "hf_quantizer", None)
        if quantiser and part == "language_model":
            config = quantiser.quantization_config
            options |= {"quantization_config": config, "device_map": {"": _device()}}
        other = read_pretrained(AutoModelForCausalLM, weights_source(str(other)), **options)
    other = other if isinstance(other, nn.Module) else other.load_model()
    if isinstance(other, LlavaForConditionalGeneration):
        source = parts(other)[part]
    else:
        source = (
            nn.ModuleDict({"model": other.model, "lm_head": other.lm_head})
            if part == "language_model"
            else other
        )
    target = parts(model)[part]
    (mine, ours, kinds), (theirs, layers, others) = map(_contents, (target, source))
    if kinds != others:
        raise ValueError(
            f"The two {part}s are not quantised alike "
            f"({len(kinds)} and {len(others)} such layers), so they cannot be swapped; load both in the same number of bits."
        )
    have, want = (
        {name: weight.shape for name, weight in weights.items()}
        | {name: layer.weight.quant_state.shape for name, layer in four.items()}
        for weights, four in ((mine, ours), (theirs, layers))
    )
    odd = [name for name in have | want if have.get(name) != want.get(name)]
    if odd:
        raise ValueError(
            f"The two {part}s differ in shape ({odd[0]} and {len(odd) - 1} more), so they cannot be swapped."
        )
    target.load_state_dict(theirs, strict=not ours)
    for name, layer in ours.items():
        weight, device = layers[name].weight, layer.weight.device
        layer.weight.data = weight.data.to(device, copy=True)
        layer.weight.quant_state = layer.quant_state = copy.deepcopy(weight.quant_state)
        layer.quant_state.to(device)
    return model


def _contents(part):
    """(weights by name, 4-bit layers by name, kind of each quantised layer by name) of a part.

    The weights are without those of the 4-bit layers.
    """
    quantised = {name: layer for name, layer in part.named_modules() if _is_quantised(layer)}
    kinds = {name: type(layer).__name__ for name, layer in quantised.items()}
    four = {name: layer for name, layer in quantised.items() if kinds[name] == "Linear4bit"}
    # a 4-bit layer keeps its scales beside its weight: load_state_dict would leave the old ones
    apart = tuple(f"{name}.weight" for name in four)
    weights = part.state_dict().items()
    return {name: w for name, w in weights if not name.startswith(apart)}, four, kinds


def freeze(model, recipe) -> None:
    """Let only the recipe's parts learn, in fp32 (LoRA: adapters in place of the language model); the rest stands still."""
    model.requires_grad_(False)
    if recipe.lora_r:
        from peft import inject_adapter_in_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            inject_adapter_in_model(_lora_config(recipe), model)
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora_" in name)
    elif "language_model" in recipe.tune:
        parts(model)["language_model"].requires_grad_(True)
    parts(model)["projector"].requires_grad_("projector" in recipe.tune)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def fingerprint(weights) -> str:
    """A hash of named weights (a module, or pairs of name and tensor): equal exactly when every bit is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(
        weights.state_dict().items() if isinstance(weights, nn.Module) else weights
    ):
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def shard(learner, recipe) -> None:
    """Spread weights, gradients and optimiser of a fully tuned model over the processes, in place (PyTorch's FSDP2)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = compute_dtype(recipe) == torch.bfloat16
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if half
        else MixedPrecisionPolicy()
    )
    for layer in learner.model.model.language_model.layers:
        fully_shard(layer, mp_policy=policy)
    # the tower is small, frozen, and used outside of the learner's forward: every process keeps it whole
    fully_shard(
        learner,
        mp_policy=policy,
        ignored_params=set(parts(learner.model)["vision_tower"].parameters()),
    )


def image_features(model, pixel_values):
    """What the projector reads: (pictures, patches, width) from the tower's last layer but one, class token dropped.

    Equal to the model's own `get_image_features` before its projector; the layers above are not computed.
    """
    tower, layers = model.model.vision_tower, model.model.vision_tower.encoder.layers
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(tower.dtype)))
    # hidden state 0 is what goes into the first layer, so there is one more of them than there are layers
    for layer in layers[: range(len(layers) + 1)[model.config.vision_feature_layer]]:
        hidden = layer(hidden, None)
    return hidden[:, 1:]


def export(model, processor, recipe, folder, init=None) -> None:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` load on their own; adapters are merged in.

    A quantised model is written in 16 bits: what it learned is put on the weights it began with (`init`, as for
    `load_model`).
    """
    if recipe.bits < 16:
        learned = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        whole = replace(recipe, bits=16)
        model = load_model(whole, init)
        freeze(model, whole)
        unknown = model.load_state_dict(learned, strict=False).unexpected_keys
        assert not unknown, f"{unknown[0]} was learned but has no place in the 16-bit model"
    if recipe.lora_r:
        _merge_adapters(model)
    # as the published LLaVA-1.5 folders name the tower's weights; transformers 5 reads both, vLLM and transformers 4 this
    tower, published = "model.vision_tower.", "model.vision_tower.vision_model."
    weights = model.to(compute_dtype(recipe)).state_dict()
    weights = {name.replace(tower, published, 1): weight for name, weight in weights.items()}
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


def save_adapter(model, recipe, folder) -> None:
    """Write what a LoRA run has learned as PEFT's files: the adapters, and the projector whole. Before `export` merges them.

    `PeftModel.from_pretrained(model it began with, folder)` puts them together again.
    """
    learned = {
        name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad
    }
    assert any("lora_" in name for name in learned), (
        "the model has no adapters, or they are merged already"
    )
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        f"base_model.model.{name.replace('.default', '')}": w.cpu().contiguous()
        for name, w in learned.items()
    }
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    whole = ["multi_modal_projector"] if "projector" in recipe.tune else None
    _lora_config(recipe, modules_to_save=whole, inference_mode=True).save_pretrained(folder)


def read_projector(source) -> dict[str, torch.Tensor]:
    """The weights of a projector, named as in `parts(model)["projector"]`, out of LLaVA's `mm_projector.bin` or whatever
    else `load_model` starts from."""
    source = _source(source)
    ours = {
        f"{i}.{kind}": f"linear_{i // 2 + 1}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    stored = {
        name.split("projector.")[1]: weight
        for name, weight in _stored(source, "projector.").items()
    }
    found = {ours.get(name, name): weight for name, weight in stored.items()}
    if set(found) != set(ours.values()):
        raise ValueError(
            f"{shown(source)} holds {', '.join(sorted(stored)) or 'no projector'}; "
            "LLaVA-1.5's projector is two layers (mm_projector.0 and mm_projector.2), each with weight and bias."
        )
    return found


def save_projector(model, path) -> Path:
    """Write the projector as LLaVA's own `mm_projector.bin`."""
    path = resolve(path)
    weights = parts(model)["projector"].state_dict(prefix="model.multi_modal_projector.")
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save({name: weight.cpu() for name, weight in to_llava(weights).items()}, scratch)
    return scratch.replace(path)


def to_llava(weights: dict) -> dict:
    """A model's weights (`state_dict()`) under the names that LLaVA's own code gives them.

    Our language models have a row more, for `<image>`: the vocab_size of LLaVA's config.json must count it.
    """
    return _renamed(weights, [(ours, theirs) for theirs, ours in _LLAVA_NAMES])


def from_llava(weights: dict) -> dict:
    """Weights under LLaVA's own names as `LlavaForConditionalGeneration` names them; tables that are computed are left out."""
    computed = ("rotary_emb.inv_freq", "embeddings.position_ids")
    return _renamed(
        {name: w for name, w in weights.items() if not name.endswith(computed)}, _LLAVA_NAMES
    )


def _renamed(weights, names):
    renamed = {}
    for name, weight in weights.items():
        old, new = next(((old, new) for old, new in names if name.startswith(old)), (None, None))
        if old is None:
            raise ValueError(f"{name}: LLaVA-1.5 has no such weight.")
        renamed[new + name.removeprefix(old)] = weight
    return renamed


def _source(weights) -> Path:
    """Where weights lie: the Hugging Face folder of a Run, such a folder, one of LLaVA's, or LLaVA's mm_projector.bin."""
    path = resolve(getattr(weights, "folder", weights))
    path = path / "model" if (path / "model").is_dir() else path
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{shown(path)}: no such file or folder to take weights from.")
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{shown(path)} is a LoRA adapter, not a model; merge it into its base model first."
        )
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{shown(path)} has no config.json and so holds no model; train that run to its end, or download all files."
        )
    alone = (path / "mm_projector.bin").is_file() and not _weight_files(path)
    return path / "mm_projector.bin" if alone else path


def _weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def _stored(source: Path, part: str) -> dict[str, torch.Tensor]:
    """Those weights in a file, or a folder's files, whose names contain `part`."""
    found = {}
    for file in [source] if source.is_file() else _weight_files(source):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as stored:
                    found |= {
                        name: stored.get_tensor(name) for name in stored.keys() if part in name
                    }
            else:
                stored = torch.load(
                    file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
                )
                found |= {name: weight for name, weight in stored.items() if part in name}
        except Exception as trouble:  # pickle, zip and safetensors each have errors of their own
            raise ValueError(
                f"{shown(file)} is damaged, or holds more than weights (a pickle may hold code; none was run); download it again."
            ) from trouble
    return found


def _is_llavas(folder: Path) -> bool:
    return "mm_vision_tower" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _llavas_text_config(source: Path) -> dict:
    """Options to load the language model that a folder of LLaVA's holds; none for a file."""
    if source.is_file():
        return {}
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    odd = {key: values[key] for key, known in _LLAVA_1_5.items() if values.get(key, known) != known}
    if odd or values.get("model_type") not in ("llava", "llava_llama"):
        raise ValueError(
            f"{shown(source)} is no LLaVA-1.5 on a Llama: {odd or values.get('model_type')}."
        )
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {
        "model_type",
        "architectures",
    }
    return dict(config=LlamaConfig(**{key: value for key, value in values.items() if key in known}))


def _config(source: str):
    """The shape of a backbone (of a whole CLIP: its picture side)."""
    where = weights_source(source)
    if where in _KNOWN:
        kind, values = _KNOWN[where]
        return kind(**values)
    try:
        config = read_pretrained(AutoConfig, where)
    except (OSError, ValueError) as trouble:
        raise ValueError(f"{source}: no config.json could be read there ({trouble})") from None
    return getattr(config, "vision_config", config)


def _llava_config(vision, text, image_token_index, **more) -> LlavaConfig:
    vision._name_or_path = text._name_or_path = (
        ""  # a folder of this machine says nothing to others
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_index,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
        **more,
    )


def compute_dtype(recipe) -> torch.dtype:
    """bf16 only where it is fast: on a CPU everything runs in fp32."""
    return (
        torch.bfloat16
        if recipe.precision == "bf16" and torch.cuda.is_available()
        else torch.float32
    )


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


def _keep_layout(model) -> None:
    """Keep 4-bit weights as they were quantised, on every processor."""
    # On a CPU with AVX512-BF16, bitsandbytes lays a layer's weights out anew when the layer first
    # computes in evaluation mode. In that layout a product has no gradient, so that a run would
    # learn wrongly after its first look at held-out rows; the scales are rounded to bf16 for good;
    # the bytes differ, so that frozen weights seem to have moved; and layers narrower than 64 fail.
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False


def _device():
    return int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"


def _lora_config(recipe, **more):
    from peft import LoraConfig

    values = dict(r=recipe.lora_r, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout)
    return LoraConfig(**values, target_modules=_LORA_TARGETS, **more)


def _merge_adapters(model) -> None:
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    model.peft_config, model._hf_peft_config_loaded = {}, False


def read_pretrained(kind, source, **options):
    """`kind.from_pretrained` in words: a folder that is damaged or lacks files is one sentence. Its code is never run."""
    options |= {"trust_remote_code": False} if kind.__name__.startswith("Auto") else {}
    try:
        return kind.from_pretrained(source, **options)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except (
        Exception
    ) as trouble:  # json, safetensors, tokenizers and transformers each have errors of their own
        kind_of = OSError if isinstance(trouble, OSError) else ValueError
        said = (str(trouble).strip() or type(trouble).__name__).splitlines()[0][:300]
        raise kind_of(
            f"{source} cannot be read: {said} - download or copy it again, whole."
        ) from trouble


def _load(kind, source, **options):
    """`read_pretrained` of a model, but a weight that the files lack, or hold in another shape, is an error."""
    loudness = logging.get_verbosity()
    logging.set_verbosity_error()  # its report would list every weight of CLIP's text side
    try:
        model, info = read_pretrained(
            kind, source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    finally:
        logging.set_verbosity(loudness)
    if info["mismatched_keys"]:
        name, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{source}: {name} is {tuple(stored)} in the files but {tuple(wanted)} by config.json "
            f"({len(info['mismatched_keys'])} such weights); take both from one place."
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} weights ({missing[0]}, ...); they would have been random. Is it the right folder?"
        )
    return model


def _grow_vocabulary(language_model, size: int) -> None:
    """Rows for added tokens, each the mean of the old rows: their logit is then a mean too and is never the largest."""
    old = language_model.get_input_embeddings().num_embeddings
    if size <= old:
        return
    language_model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for table in (
            language_model.get_input_embeddings().weight,
            language_model.get_output_embeddings().weight,
        ):
            table[old:] = table[:old].mean(dim=0)
