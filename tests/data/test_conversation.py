import copy
import doctest
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from vflan.config import ROOT
from vflan.data.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    SYSTEM,
    audit,
    chat_template,
    encode,
    expand,
    prompt_ids,
)


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def learned(tokenizer, ids, labels):
    """The text of each run of learned tokens."""
    runs, last = [], IGNORE_INDEX
    for label in labels:
        if label != IGNORE_INDEX:
            runs = [*runs, []] if last == IGNORE_INDEX else runs
            runs[-1].append(label)
        last = label
    return [tokenizer.decode(run).strip() for run in runs]


@pytest.fixture(scope="session")
def tokenizer(backbones):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(backbones["language_model"])


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The mini world's, which begins every text with a space, as that of the older Vicunas does."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny" / "language_model")


def test_the_example_of_encode_is_true(tiny_tokenizer):
    names = {"encode": encode, "tokenizer": tiny_tokenizer}
    (example,) = doctest.DocTestFinder().find(encode, globs=names)
    assert len(example.examples) == 4
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0 and result.attempted == 4


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_and_labels_equal_the_reference(shared, legacy):
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(shared / "golden", legacy=legacy)
    for case in json.loads((shared / "golden" / "llava_tokens.json").read_text()):
        ids, labels = encode(case["conversations"], tokenizer, case["template"])
        assert ids == case["input_ids" if legacy else "input_ids_legacy_false"], case["name"]
        # the reference printed labels for legacy ids only; other ids supervise the same answers
        assert [label for label in labels if label >= 0] == [
            label for label in case["labels"] if label >= 0
        ], case["name"]
        assert not legacy or labels == case["labels"], case["name"]


def test_answers_and_their_end_tokens_are_learned_and_nothing_else(tokenizer):
    ids, labels = encode(
        turns("<image>\nWhat color is it?", "red", "Is it a square?", "a blue square"), tokenizer
    )
    assert learned(tokenizer, ids, labels) == ["red</s>", "a blue square</s>"]
    assert all(label in (IGNORE_INDEX, i) for i, label in zip(ids, labels))


def test_the_plain_template_learns_the_caption_and_a_newline_only(tokenizer):
    ids, labels = encode(turns("Describe.\n<image>", "a red square"), tokenizer, "plain")
    assert ids[:2] == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX] and labels[2:] == ids[2:]
    assert tokenizer.decode(ids[2:]) == "a red square\n"


def test_the_image_moves_to_the_front_of_its_question(tokenizer):
    first = encode(turns("<image>\nWhat color is it?", "red"), tokenizer)
    assert encode(turns("What color is it?\n<image>", "red"), tokenizer) == first
    assert (
        encode(turns("What color <image><image> is it?", "red"), tokenizer)[0].count(
            IMAGE_TOKEN_INDEX
        )
        == 1
    )


def test_generation_starts_from_the_ids_that_training_saw(tokenizer):
    for text, image in (
        ("<image>\nWhat color is it?", True),
        ("What is a square?", False),
        ("<image>", True),
    ):
        ids, labels = encode(turns(text, "red"), tokenizer)
        prompt = prompt_ids(text, tokenizer, has_image=image)
        assert (
            ids[: len(prompt)] == prompt
            and labels[len(prompt)] != IGNORE_INDEX
            and set(labels[: len(prompt)]) == {IGNORE_INDEX}
        )
        assert tokenizer.decode(prompt[-1:]) == "ASSISTANT:"


@pytest.mark.parametrize("mark", ["<image>\n", ""])
def test_a_later_answer_is_generated_from_the_ids_that_training_saw_before_it(tokenizer, mark):
    pairs = [
        (f"{mark}What color is it?", "red"),
        ("Is it a square?", "a blue square"),
        ("And here?", "a red one"),
    ]
    ids, labels = encode(turns(*(text for pair in pairs for text in pair)), tokenizer)
    for turn, (question, answer) in enumerate(pairs):
        prompt = prompt_ids(question, tokenizer, has_image=bool(mark), before=pairs[:turn])
        assert ids[: len(prompt)] == prompt and tokenizer.decode(prompt[-1:]) == "ASSISTANT:"
        rest = [
            i
            for i, label in zip(ids[len(prompt) :], labels[len(prompt) :])
            if label != IGNORE_INDEX
        ]
        assert tokenizer.decode(rest).strip().startswith(answer)


def test_the_system_text_is_at_the_start_once(tokenizer):
    ids, _ = encode(turns("What?", "red", "And?", "blue"), tokenizer)
    assert tokenizer.decode(ids).count(SYSTEM) == 1


@pytest.mark.parametrize(
    "conversation, kept",
    [
        ([{"from": "gpt", "value": "hi"}, *turns("<image>\nWhat?", "red")], ["red</s>"]),
        (turns("<image>\nWhat?", "red", "And?"), ["red</s>"]),
        (turns("<image>\nWhat?", "", "And?", "blue"), ["blue</s>"]),
        (turns("<image>\nWhat?", "say ASSISTANT: red"), ["say ASSISTANT: red</s>"]),
        (turns("<image>\nWhat?", "red", "And?", "a</s>b"), ["red</s>", "a</s>b</s>"]),
    ],
    ids=["answer first", "question last", "empty answer", "role name inside", "end token inside"],
)
def test_the_sound_part_of_a_sample_that_the_reference_drops_is_kept(tokenizer, conversation, kept):
    ids, labels = encode(conversation, tokenizer)
    assert learned(tokenizer, ids, labels) == kept
    # The image stays, also if its question is left out.
    assert ids.count(IMAGE_TOKEN_INDEX) == 1
    # An end token that a person wrote is text.
    assert ids.count(tokenizer.eos_token_id) == len(kept)
    assert bool(audit(conversation).dropped) == (
        len(kept) < len(conversation) / 2 or conversation[0]["from"] == "gpt"
    )


def test_a_conversation_with_nothing_to_learn_is_an_error_with_the_reason(tokenizer):
    for conversation, why in (
        (turns("What?"), "wrong order"),
        (turns("What?", " "), "empty answer"),
        ([], "no turns"),
    ):
        with pytest.raises(ValueError, match=why):
            encode(conversation, tokenizer)
    for conversation, why in (
        (turns("Describe.", "red"), "no image token"),
        (
            turns("<image>", "red", "And?", "blue"),
            "2 answers: the plain template is a picture and one caption",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            encode(conversation, tokenizer, "plain")


def test_a_prompt_of_another_template_names_the_image_once_whatever_was_asked_before(tokenizer):
    other = copy.copy(tokenizer)
    other.chat_template = chat_template(tokenizer)
    plain, marked = (
        prompt_ids("Is it big?", other, "own", before=[(question, "red")])
        for question in ("What color is it?", "<image>\nWhat color is it? ")
    )
    assert plain == marked and plain.count(IMAGE_TOKEN_INDEX) == 1


def test_the_chat_template_tokenised_at_once_gives_the_ids_of_training(tokenizer, tiny_tokenizer):
    for spelling in (tokenizer, tiny_tokenizer):
        ids, labels = encode(
            turns("<image>\nWhat color is it?", "a red square", "Is it big?", "no"), spelling
        )
        picture = [{"type": "image"}, {"type": "text", "text": "What color is it?"}]
        messages = [
            dict(role="user", content=picture),
            dict(role="assistant", content="a red square"),
        ]
        messages += [dict(role="user", content="Is it big?")]
        text = spelling.apply_chat_template(
            messages,
            chat_template=chat_template(spelling),
            add_generation_prompt=True,
            tokenize=False,
        )
        image = spelling.convert_tokens_to_ids("<image>")
        end = max(i for i in range(1, len(ids)) if labels[i] != IGNORE_INDEX == labels[i - 1])
        assert [IMAGE_TOKEN_INDEX if i == image else i for i in spelling(text).input_ids] == ids[
            :end
        ]


def test_a_system_message_takes_the_place_of_the_system_sentence(tokenizer):
    def render(messages):
        options = dict(chat_template=chat_template(tokenizer), tokenize=False)
        return tokenizer.apply_chat_template(messages, **options, add_generation_prompt=True)

    user = dict(role="user", content="What?")
    assert render([user]) == f"{SYSTEM} USER: What? ASSISTANT:"
    parts = [{"type": "text", "text": "Be brief."}]
    for content in ("Be brief.", parts):
        system = dict(role="system", content=content)
        assert render([system, user]) == "Be brief. USER: What? ASSISTANT:"
    for messages in ([user, dict(role="system", content="x")], [dict(role="tool", content="x")]):
        with pytest.raises(TemplateError, match="roles are user and assistant"):
            render(messages)


def test_expand_widens_the_image_in_ids_and_in_labels(tokenizer):
    ids, labels = expand([1, IMAGE_TOKEN_INDEX, 5, 6], [-100, -100, -100, 6], 3, image_token_id=9)
    assert (ids, labels) == ([1, 9, 9, 9, 5, 6], [-100] * 5 + [6])
    assert expand([1, 5], [-100, 5], 3, 9) == ([1, 5], [-100, 5])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=2, max_size=6), st.booleans())
def test_for_any_text_labels_copy_the_ids_and_each_turn_has_one_end_token(tokenizer, texts, image):
    texts = [text.replace("<image>", "") for text in texts[: len(texts) // 2 * 2]]
    texts[0] = "<image>" * image + texts[0]
    try:
        pairs = audit(turns(*texts)).pairs
    except ValueError:
        return
    ids, labels = encode(turns(*texts), tokenizer)
    assert len(ids) == len(labels) and all(
        label in (IGNORE_INDEX, i) for i, label in zip(ids, labels)
    )
    assert ids.count(tokenizer.eos_token_id) == labels.count(tokenizer.eos_token_id) == len(pairs)
    assert ids.count(IMAGE_TOKEN_INDEX) == image
