"""Folders like those that the real presets read, but tiny: Vicuna, CLIP, LLaVA's projector, data.

A language model has two .bin shards and a SentencePiece tokenizer without `<image>`; SmolLM2's has
tied weights and a byte-level tokenizer that begins no text by itself; CLIP is a whole one, text
side included; a projector is LLaVA's mm_projector.bin.
"""

import io
import json
from shutil import copytree

import torch
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from vflan import world
from vflan.data.conversation import SYSTEM

WIDTH = 64


def make_language_model(folder, seed):
    """Like lmsys/vicuna-7b-v1.5; with another seed like meta-llama/Llama-2-7b-chat-hf."""
    folder.mkdir(parents=True)
    text = [SYSTEM, "USER: ASSISTANT:", "What color is the square? yes, no, a red one."]
    SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_writer=(tokenizer := io.BytesIO()),
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(tokenizer.getvalue())
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)
    names |= dict(tokenizer_class="LlamaTokenizer", legacy=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    from sentencepiece import SentencePieceProcessor

    rows = len(SentencePieceProcessor(model_proto=tokenizer.getvalue()))
    torch.manual_seed(seed)
    small = dict(hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, num_attention_heads=4, **small))
    model.config.save_pretrained(folder)
    _write_shards(folder, model.half().state_dict())
    return str(folder)


def make_smollm(folder, seed):
    """Like HuggingFaceTB/SmolLM2-135M-Instruct; with another seed like SmolLM2-135M."""
    named = dict(unk_token="<|endoftext|>", bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True)]
    split += [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    text = [SYSTEM, "USER: ASSISTANT:", "What color is the square? yes, no, a red one."]
    letters = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=400, special_tokens=[*named.values()], initial_alphabet=letters)
    tokenizer.train_from_iterator(text * 20, trainers.BpeTrainer(**options))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=named["eos_token"], **named
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    small = dict(hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2)
    small |= dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    config = LlamaConfig(vocab_size=len(fast), **small, **ends)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return str(folder)


def _write_shards(folder, weights):
    names, where = sorted(weights), {}
    for i, mine in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({name: weights[name].clone() for name in mine}, folder / file)
        where |= dict.fromkeys(mine, file)
    index = dict(metadata={}, weight_map=where)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def make_clip(folder):
    """Like openai/clip-vit-large-patch14-336, with 2 x 2 patches."""
    small = dict(hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2)
    small |= dict(num_attention_heads=4)
    vision, text = small | dict(image_size=28, patch_size=14), small | dict(vocab_size=99)
    torch.manual_seed(7)
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=WIDTH))
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    crop = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop).save_pretrained(folder)
    return str(folder)


def make_projector(path, vision=WIDTH, text=WIDTH):
    """LLaVA's mm_projector.bin in 16 bits, as it was released for LLaVA-1.5."""
    torch.manual_seed(11)
    layers = torch.nn.Sequential(
        torch.nn.Linear(vision, text), torch.nn.GELU(), torch.nn.Linear(text, text)
    )
    weights = layers.half().state_dict(prefix="model.mm_projector.")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    return str(path)


def make_data(folder):
    """Samples of the mini world, and what a real folder of benchmarks holds.

    POPE and MME, and LLaVA-Bench in its released form, whose answers GPT-4 would judge.
    """
    built = world.build(folder / "world", captions=16, per_kind=2, conversations=60, questions=0.02)
    for name in ("pope", "mme", "images"):
        copytree(built / "benchmarks" / name, folder / "benchmarks" / name)
    home = folder / "benchmarks" / "llava_bench"
    home.mkdir()
    picture = next((folder / "benchmarks" / "images").iterdir()).name
    copytree(folder / "benchmarks" / "images", home / "images")
    kinds = ("conv", "detail", "complex")
    asked = [
        dict(question_id=i, image=picture, text="What is it?", category=kind)
        for i, kind in enumerate(kinds)
    ]
    answers = [dict(question_id=i, text="A square.") for i in range(len(asked))]
    for name, rows in (("questions", asked), ("answers_gpt4", answers)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return built / "samples", folder / "benchmarks"
