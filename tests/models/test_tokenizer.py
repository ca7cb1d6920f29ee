"""A tokenizer from a SentencePiece file gives the ids of SentencePiece itself."""

import io
import json
import random

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

from vflan import preset, replace
from vflan.data.conversation import encode, keep_first_space, prompt_ids
from vflan.models.tokenizer import load_tokenizer

STRETCHES = ["is", "a", "  ", "   ", " ", "\n", "\t", "town", "picture", "é", "日本", "😀", "שלום"]
STRETCHES += ["%", "23", "\r", "\u3000", "\u00a0", "▁", "the", "<0x41>", "  \n  ", "\u200b", "ﬁ"]
STRETCHES += ["e\u0301", "\x00"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer.model like Llama's: byte pieces, no normalisation, runs of spaces scored last."""
    folder, rng = tmp_path_factory.mktemp("llama"), random.Random(0)
    words = (
        "the town is a picture of what how many colour red answer question assistant user cup table"
    )
    lines = [
        " ".join(rng.choices(words.split(), k=12)) + rng.choice([".", "?", ":\n"])
        for _ in range(300)
    ]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=(written := io.BytesIO()),
        vocab_size=600,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    known = {piece.piece for piece in proto.pieces}
    first = next(i for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL)
    Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
    runs = [Piece(piece="▁" * n, score=-1e9) for n in range(2, 17) if "▁" * n not in known]
    assert len(runs) == 15
    pieces = [*proto.pieces[:first], *runs, *proto.pieces[first:]]
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


@pytest.fixture(params=[True, False], ids=["legacy", "not legacy"])
def pair(request, folder, tmp_path):
    """SentencePiece, and our tokenizer of a folder that has nothing but its file."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": request.param, **names}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(replace(preset("tiny").base, language_model=str(tmp_path)))
    return SentencePieceProcessor(str(folder / "tokenizer.model")), tokenizer


def texts(count):
    rng = random.Random(1)
    return ["".join(rng.choices(STRETCHES, k=rng.randint(1, 20))) for _ in range(count)]


def ids(tokenizer, text):
    return tokenizer(keep_first_space(tokenizer, text), add_special_tokens=False).input_ids


def test_two_spaces_in_a_row_are_two_pieces(pair):
    reference, tokenizer = pair
    assert ids(tokenizer, "is  a town") == reference.encode("is  a town")
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, "is  a")) == ["▁is", "▁", "▁a"]


def test_any_text_gets_the_ids_of_sentencepiece(pair):
    reference, tokenizer = pair
    wrong = [text for text in texts(2000) if ids(tokenizer, text) != reference.encode(text)]
    assert wrong == []


def test_a_saved_copy_gives_the_same_ids(pair, tmp_path):
    from transformers import AutoTokenizer

    reference, tokenizer = pair
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    wrong = [text for text in texts(500) if ids(saved, text) != reference.encode(text)]
    assert wrong == []


def test_a_question_that_is_the_picture_alone_keeps_the_space_before_the_answer(pair):
    reference, tokenizer = pair
    ids = prompt_ids("<image>", tokenizer)
    assert ids[ids.index(-200) + 1 :] == reference.encode(" ASSISTANT:")


def test_a_caption_that_begins_with_a_space_keeps_it(pair):
    reference, tokenizer = pair
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " a  cup"}]
    ids, labels = encode(turns, tokenizer, "plain")
    assert ids == [1, -200, *reference.encode(" a  cup\n")]
    assert [label for label in labels if label != -100] == reference.encode(" a  cup\n")
