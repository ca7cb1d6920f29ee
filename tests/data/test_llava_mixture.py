"""LLaVA-1.5's rules one by one, and the published row counts from inputs of the same sizes."""

import json
from collections import Counter

import pytest

from vflan.data.conversation import encode
from vflan.data.llava_mixture import (
    ROWS,
    a_okvqa,
    llava_mixture,
    one_conversation_per_image,
    padded_box,
    records,
    sharegpt,
)
from vflan.data.samples import load_samples, save_samples
from vflan.data.validation import check


class Words:
    """A tokenizer for which every word is a token."""

    bos_token_id, eos_token_id, eos_token, all_special_tokens = 1, 2, "</s>", ["</s>"]

    def __call__(self, texts, **_):
        self.input_ids = [[3] * len(text.split()) for text in texts]
        return self


def qa(image, question="q", answer="a"):
    return {"image": image, "question": question, "answer": answer}


def choice(image, right=1):
    return {
        "image": image,
        "question": "q",
        "choices": ["red", "blue", "green", "black"],
        "correct_choice_idx": right,
    }


def region(image, phrase="a hat"):
    return {
        "image": image,
        "width": 640,
        "height": 480,
        "box": (64, 48, 320, 240),
        "phrase": phrase,
    }


def talk(*texts, **row):
    roles = ("human", "gpt") * len(texts)
    return {
        "id": "s",
        "conversations": [{"from": r, "value": v} for r, v in zip(roles, texts)],
    } | row


def texts_of(row):
    return [turn["value"] for turn in row["conversations"]]


def test_all_questions_of_a_picture_become_one_conversation_with_the_prompt_in_the_first_turn():
    rows = list(
        one_conversation_per_image(
            [qa("b.jpg", "1?"), qa("a.jpg"), qa("b.jpg", "2?", "two")], "In a word.", "gqa"
        )
    )
    assert [row["image"] for row in rows] == ["b.jpg", "a.jpg"]
    assert texts_of(rows[0]) == ["<image>\n1?\nIn a word.", "a", "2?", "two"]
    assert (rows[0]["id"], rows[0]["task_name"]) == ("b", "gqa")


def test_a_okvqa_has_a_row_for_each_choice_with_the_options_rotated():
    rows = list(a_okvqa([choice("x.jpg"), choice("x.jpg", right=3)]))
    prompt = "Answer with the option's letter from the given choices directly."
    assert texts_of(rows[0])[:2] == [
        f"<image>\nq\nA. red\nB. blue\nC. green\nD. black\n{prompt}",
        "B",
    ]
    assert texts_of(rows[1])[0] == f"<image>\nq\nA. blue\nB. green\nC. black\nD. red\n{prompt}"
    assert [texts_of(row)[1::2] for row in rows] == [["B", "D"], ["A", "C"], ["D", "B"], ["C", "A"]]
    assert len({row["id"] for row in rows}) == 4


def test_boxes_are_relative_to_the_padded_square_with_two_decimals():
    assert padded_box((64, 48, 320, 240), 640, 480) == "[0.10, 0.20, 0.60, 0.57]"
    assert padded_box((0, 0, 480, 640), 480, 640) == "[0.12, 0.00, 0.88, 1.00]"
    # A box beyond the edge ends at the edge.
    assert padded_box((0, 0, 9.7, 5), 9, 5) == "[0.00, 0.22, 1.00, 0.78]"


def test_textcaps_has_the_words_of_ocr_below_the_prompt():
    (row,) = llava_mixture(
        {"textcaps": [{"image": "t.jpg", "caption": "A sign.", "ocr_tokens": ["stop", "ALL"]}]}
    )
    prompt = "Provide a one-sentence caption for the provided image."
    assert texts_of(row) == [f"<image>\n{prompt}\nReference OCR token: stop, ALL", "A sign."]


def test_refcoco_is_cut_into_segments_of_fewer_than_ten_pairs_and_asks_both_ways():
    rows = list(llava_mixture({"refcoco": [region("c.jpg", f"hat {n}") for n in range(23)]}))
    assert [len(row["conversations"]) // 2 for row in rows] == [9, 9, 5]
    assert all(texts_of(row)[0].startswith("<image>\nPlease provide") for row in rows)
    kinds = Counter(
        text.removeprefix("<image>\n").split(":")[0] for row in rows for text in texts_of(row)[::2]
    )
    assert set(kinds) == {
        "Please provide a short description for this region",
        "Please provide the bounding box coordinate of the region this sentence describes",
    }
    assert "hat 7" in " ".join(texts_of(rows[0]))


def test_visual_genome_keeps_ten_regions_of_a_picture_in_their_order():
    many, few = [region("v.jpg", f"{n:02}") for n in range(30)], [region("w.jpg")]
    rows = list(llava_mixture({"vg": many + few}))
    phrases = [text[-2:] for text in texts_of(rows[0])[::2]]
    assert (
        len(phrases) == 10
        and phrases == sorted(phrases)
        and phrases != [f"{n:02}" for n in range(10)]
    )
    assert texts_of(rows[1])[1] == "[0.10, 0.20, 0.60, 0.57]"
    assert texts_of(next(llava_mixture({"vg": many}, seed=1))) != texts_of(rows[0])


@pytest.mark.parametrize(
    "row",
    [
        talk(),
        talk("only a question"),
        talk("q", " "),
        {"id": "s", "conversations": None},
        {
            "id": "s",
            "conversations": [{"from": "human", "value": "q"}, {"from": "bing", "value": "a"}],
        },
        {
            "id": "s",
            "conversations": [{"from": "human", "value": "q"}] * 2
            + [{"from": "gpt", "value": "a"}],
        },
        talk("one question of " + "many " * 3000, "a"),
    ],
)
def test_an_invalid_sharegpt_conversation_is_left_out(row):
    assert list(sharegpt([row], Words())) == []


def test_a_valid_sharegpt_conversation_is_not_changed():
    (row,) = sharegpt([talk("html: <image>", "an <image> tag", model="GPT-4")], Words())
    assert (
        texts_of(row) == ["html: <image>", "an <image> tag"]
        and row["model"] == "GPT-4"
        and "image" not in row
    )
    (row,) = sharegpt([talk("1 + 1 = ?", 2)], Words())
    assert texts_of(row) == ["1 + 1 = ?", "2"]
    (row,) = sharegpt([talk("", "hello", "q", "a", "left open")], Words())
    assert texts_of(row) == ["", "hello", "q", "a"]


def test_a_long_sharegpt_conversation_is_cut_not_split():
    words, pair = Words(), ("a " * 50, "b " * 100)
    (row,) = sharegpt([talk(*pair * 40)], words, max_length=500)
    assert texts_of(row) == [*pair * 3]  # the fourth would not fit
    (row,) = sharegpt([talk("q", "b " * 5000, "q", "a")], words, max_length=500)
    assert len(encode(row["conversations"], words)[0]) == 500 and len(texts_of(row)) == 2


def test_llava_instruct_changes_only_the_folder_of_its_images():
    row = talk("<image>\nq", "a", image="000000033471.jpg")
    (out,) = llava_mixture({"llava_instruct": [row]})
    assert out == row | {"image": "coco/train2017/000000033471.jpg", "task_name": "llava_instruct"}


def test_the_sources_own_files_become_records_and_rows(tmp_path):
    questions = {"questions": [{"image_id": 9, "question": "q", "question_id": 1}]}
    answers = [{"answer": answer} for answer in ("no", "yes", "yes")]
    book = {"questions": ["who?"], "answers": ["me"], "split": 1}
    published = {
        "vqav2": (questions, {"annotations": [{"question_id": 1, "answers": answers}]}),
        "gqa": ({"0": {"imageId": "77", "question": "q", "answer": "left", "isBalanced": True}},),
        "ocrvqa": ({"0071": book, "test": book | {"split": 3}},),
        "aokvqa": (
            [
                {
                    "image_id": 9,
                    "question": "q",
                    "choices": ["a", "b"],
                    "correct_choice_idx": 0,
                    "difficult": False,
                }
            ],
        ),
        "textcaps": (
            {
                "data": [
                    {"image_id": "x1", "caption_str": "first"},
                    {"image_id": "x1", "caption_str": "second"},
                ]
            },
            {"data": [{"image_id": "x1", "ocr_tokens": ["STOP"]}]},
        ),
        "vg": (
            [
                {
                    "id": 5,
                    "regions": [
                        {
                            "image_id": 5,
                            "x": 0,
                            "y": 0,
                            "width": 50,
                            "height": 100,
                            "phrase": "a half",
                        }
                    ],
                }
            ],
            [{"image_id": 5, "width": 100, "height": 100, "url": "https://x/VG_100K_2/5.jpg"}],
        ),
    }
    sources = {}
    for name, contents in published.items():
        files = [tmp_path / f"{name}{number}.json" for number in range(len(contents))]
        for file, content in zip(files, contents):
            file.write_text(json.dumps(content))
        sources[name] = records(name, *files)
    rows = list(llava_mixture(sources))
    assert [(row["image"], texts_of(row)[1]) for row in rows] == [
        ("coco/train2017/000000000009.jpg", "yes"),
        ("gqa/images/77.jpg", "left"),
        ("ocr_vqa/images/0071.jpg", "me"),
        ("coco/train2017/000000000009.jpg", "A"),
        ("coco/train2017/000000000009.jpg", "B"),
        ("textvqa/train_images/x1.jpg", "first"),
        ("vg/VG_100K_2/5.jpg", "[0.00, 0.00, 0.50, 1.00]"),
    ]
    with pytest.raises(ValueError, match="reads no 'refcoco'"):
        records("refcoco")


def test_an_unknown_source_and_a_missing_tokenizer_are_errors():
    with pytest.raises(ValueError, match="no source 'vqa'; the closest is 'vqav2'"):
        list(llava_mixture({"vqa": []}))
    with pytest.raises(ValueError, match="give the tokenizer"):
        list(llava_mixture({"sharegpt": []}))


def test_the_saved_mixture_can_be_read_and_checked(tmp_path):
    sources = {"gqa": [qa("g.png")], "sharegpt": [talk("q", "a")], "refcoco": [region("g.png")]}
    samples = load_samples(save_samples(llava_mixture(sources, Words()), tmp_path / "mix.json"))
    assert samples["task_name"][:] == ["sharegpt", "gqa", "refcoco"]
    assert set(check(samples).reasons.index) == {"missing picture"}  # and nothing else


def test_inputs_of_the_published_sizes_give_the_published_row_counts():
    def pictures(count, each, make):
        return (
            make(f"{n}.jpg")
            for n in range(count)
            for _ in range(each(n) if callable(each) else each)
        )

    sources = {
        "llava_instruct": (talk("<image>\nq", "a", image="1.jpg") for _ in range(157_712)),
        "sharegpt": (
            talk("q", "a") if n % 20 else talk("q") for n in range(42_830)
        ),  # every 20th is invalid
        "vqav2": pictures(82_783, 2, qa),
        "gqa": pictures(72_140, 2, qa),
        "okvqa": pictures(8_998, lambda n: 1 + (n < 11), qa),
        "ocrvqa": pictures(166_000, 1, qa),
        "aokvqa": pictures(16_540, lambda n: 1 + (n < 516), choice),
        "textcaps": (
            {"image": f"{n}.jpg", "caption": "c", "ocr_tokens": ["x"]} for n in range(21_953)
        ),
        # The regions of its images are not published: any lengths whose segments add up.
        "refcoco": pictures(24_224, lambda n: 1 if n == 0 else 18 if n % 50 == 0 else 10, region),
        "vg": pictures(86_417, lambda n: 12 if n % 40 == 0 else 1, region),
    }
    counts, images, longest = Counter(), Counter(), 0
    for row in llava_mixture(sources, Words()):
        counts[row["task_name"]] += 1
        images["text only" if "image" not in row else row["task_name"]] += 1
        longest = max(
            longest, len(row["conversations"]) if row["task_name"] in ("refcoco", "vg") else 0
        )
    assert counts == ROWS and counts.total() == 665_298
    assert images["text only"] == 40_688 and longest == 20  # ten regions of Visual Genome


def test_the_published_counts_add_up():
    assert sum(ROWS.values()) == 665_298
    coco = sum(ROWS[name] for name in ("llava_instruct", "vqav2", "okvqa", "aokvqa", "refcoco"))
    assert coco == 364_100
