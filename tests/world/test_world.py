"""The mini world is exact, deterministic and balanced; training and evaluation share no scene."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from vflan import world
from vflan.world import chats
from vflan.world.scene import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    held,
    render,
    rng_of,
    sample_scene,
)  # fmt: skip
from vflan.world.tasks import KINDS, added_kinds, kind, sample, table
from vflan.world.words import describe


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return world.build(
        tmp_path_factory.mktemp("tiny"), captions=60, per_kind=4, conversations=60, questions=0.15
    )


def rows(built, name):
    if (built / "samples" / f"{name}.json").exists():
        return json.loads((built / "samples" / f"{name}.json").read_text())
    return [json.loads(line) for line in (built / "benchmarks" / name / "questions.jsonl").open()]


def test_a_picture_depends_on_its_scene_and_seed_alone():
    scenes = [sample_scene(rng_of("same", 3), seed=3) for _ in range(2)]
    assert scenes[0] == scenes[1]
    assert render(scenes[0]).tobytes() == render(scenes[1]).tobytes()
    assert render(scenes[0]).size == (48, 48)


def test_the_collection_is_as_wide_as_promised():
    kinds = table()
    assert len(kinds) >= 60 and kinds.category.nunique() >= 15
    assert set(kinds.group) == {"question answering", "classification", "generation"}
    assert (kinds.split == "heldout").sum() >= 12
    assert ((kinds.split == "heldout") & ~kinds.in_text).sum() >= 6
    assert kinds.instruction.str.replace(r"\W", "", regex=True).nunique() == len(kinds)
    assert {k.image_first for k in KINDS.values()} == {True, False}


def test_answers_are_short_as_in_the_real_data():
    words = [len(a.split()) for k in KINDS.values() for _, _, a in sample(k, 5, "short")]
    assert np.median(words) <= 4


@pytest.mark.parametrize("name", [k.name for k in KINDS.values() if k.options])
def test_no_answer_of_a_balanced_kind_passes_60_percent(name):
    answers = Counter(a.split(",")[0] for _, _, a in sample(KINDS[name], 60, "balance"))
    assert max(answers.values()) <= 36


@pytest.fixture
def mine():
    """Declares a kind of one's own, which is forgotten after the test."""

    def declare(make, **more):
        make.__module__ = "__main__"
        kind("perception", **more)(make)

    yield declare
    KINDS.pop("my_kind", None)


def test_a_kind_that_fits_no_scene_does_not_search_for_ever(mine):
    def my_kind(scene, rng):
        return None

    mine(my_kind)
    with pytest.raises(ValueError, match="'my_kind' gave no question for any of 10,000 scenes"):
        added_kinds()


def test_a_world_is_built_again_when_its_table_of_tasks_changes(mine):
    def my_kind(scene, rng):
        return "How many?", "one"

    hashes = []
    for in_text in (True, False, True):
        mine(my_kind, in_text=in_text)
        hashes.append(added_kinds()["my_kind"])
    assert hashes[0] == hashes[2] != hashes[1]


def test_answers_follow_from_the_scene():
    for scene, instruction, answer in sample(KINDS["color_of"], 30, "exact"):
        (thing,) = [t for t in scene.things if f" {t.shape}?" in instruction]
        assert answer == thing.color
    for scene, instruction, answer in sample(KINDS["exist_shape"], 30, "exact"):
        assert (answer == "yes") == any(f" {t.shape} " in instruction for t in scene.things)
    for scene, instruction, answer in sample(KINDS["above"], 30, "exact"):
        a, b = (
            next(t for t in scene.things if t.shape == s)
            for s in instruction[7:-1].split(" above the ")
        )
        assert (answer == "yes") == (a.row < b.row)
    for scene, instruction, answer in sample(KINDS["choose_shape"], 30, "exact"):
        (thing,) = [t for t in scene.things if f" {PLACES[t.place]}?" in instruction]
        assert f"({answer}) {thing.shape}" in instruction


def test_a_caption_tells_every_object():
    scene = sample_scene(rng_of("caption"), "objects", 4)
    for t in scene.things:
        assert f"{PLACES[t.place]} {t.size} {t.texture} {t.color} {t.shape}." in describe(scene)
    mixed = describe(scene, rng_of("order"))
    assert sorted(mixed.replace(".", "").split()) == sorted(
        describe(scene).replace(".", "").split()
    )


def test_training_and_evaluation_draw_different_scenes():
    train = {s for k in list(KINDS.values())[::5] for s, _, _ in sample(k, 40, "t")}
    test = {s for k in list(KINDS.values())[::5] for s, _, _ in sample(k, 40, "t", evaluation=True)}
    assert not any(map(held, train)) and all(map(held, test))


def test_no_evaluation_picture_is_a_training_picture(built):
    def digests(folder):
        return {
            hashlib.sha256(p.read_bytes()).digest() for p in (built / folder / "images").iterdir()
        }

    assert not digests("samples") & digests("benchmarks")
    assert len(digests("benchmarks")) > 200


def test_held_out_kinds_never_come_with_a_picture(built):
    trained = {r["task_name"] for name in ("captions", "flan", "chat") for r in rows(built, name)}
    away = {k.name for k in KINDS.values() if k.split != "train"}
    assert not trained & away
    assert {r["category"] for r in rows(built, "heldout")} == {
        k.name for k in KINDS.values() if k.split == "heldout"
    }


def test_kinds_new_in_both_have_wordings_that_no_training_text_has():
    slots = {*COLORS, *SHAPES, *PLACES, *SIZES, *TEXTURES, *BACKGROUNDS, *"1234"}

    def wording(instruction):
        return " ".join(
            w for w in instruction.replace("?", "").replace(",", "").split() if w not in slots
        )

    met = {wording(i) for k in KINDS.values() if k.in_text for _, i, _ in sample(k, 10, "words")}
    for k in KINDS.values():
        if not k.in_text:
            assert not met & {wording(i) for _, i, _ in sample(k, 10, "words")}, k.name


def test_rows_have_the_released_shape(built):
    for name in ("captions", "flan", "chat"):
        for r in rows(built, name):
            assert set(r) - {"image"} == {"id", "task_name", "conversations"}
            assert [t["from"] for t in r["conversations"]] == ["human", "gpt"] * (
                len(r["conversations"]) // 2
            )
            assert ("image" in r) == (r["conversations"][0]["value"].count("<image>") == 1)
            assert "image" not in r or (built / "samples" / "images" / r["image"]).is_file()
    assert any("image" not in r for r in rows(built, "chat"))


def test_the_alignment_set_errs_at_its_stated_rate():
    wrong = facts = 0
    for i in range(600):
        rng = rng_of("rate", i)
        scene = sample_scene(rng, "objects")
        view, errors = chats.noisy_view(scene, rng)
        wrong, facts = wrong + errors, facts + len(scene.things)
        assert (
            len(set(scene.things) - set(view.things)) + max(0, len(view.things) - len(scene.things))
            == errors
        )
    assert 0.05 < wrong / facts < 0.15


def test_pope_asks_after_what_is_there_and_what_is_not(built):
    scenes = {}

    def scene_of(key, i, kind="objects", fits=lambda s: True):
        rng = rng_of("pope test", i)
        while not fits(scene := sample_scene(rng, kind)):
            pass
        scenes[f"pope_{i}.png"] = scene
        return scene, rng

    questions = world.pope(20, scene_of, lambda name, scene: name)
    for q in questions:
        shape = q["text"].split()[3]
        assert (q["label"] == "yes") == any(t.shape == shape for t in scenes[q["image"]].things)
    counts = Counter((q["category"], q["label"]) for q in questions)
    assert len(counts) == 6 and set(counts.values()) == {40}


def test_mme_pairs_one_yes_with_one_no(built):
    pairs = {}
    for r in rows(built, "mme"):
        pairs.setdefault(r["question_id"].rsplit("_", 1)[0], []).append(r["label"])
    assert all(sorted(labels) == ["no", "yes"] for labels in pairs.values())


def test_every_rotation_of_a_choice_has_the_same_right_option(built):
    right = {}
    for r in rows(built, "mmbench"):
        option = r["text"].split(f"({r['label']}) ")[1].split()[0]
        right.setdefault(r["question_id"].split("_")[0], []).append((option, r["label"]))
    assert all(
        len({o for o, _ in turns}) == 1 and len({x for _, x in turns}) == 4
        for turns in right.values()
    )


def test_open_prompts_stay_out_of_the_language_models_text():
    prompts = {q for group in (chats.OPEN, chats.NEW) for qs in group.values() for q in qs}
    assert not prompts & {i for k in KINDS.values() for _, i, _ in sample(k, 10, "open")}


def test_a_finished_world_is_not_written_again(built):
    before = (built / "samples" / "built.json").stat().st_mtime_ns
    world.build(built, captions=60, per_kind=4, conversations=60, questions=0.15)
    assert (built / "samples" / "built.json").stat().st_mtime_ns == before


def test_what_a_killed_build_left_is_cleared_away(built, tmp_path):
    (tmp_path / ".samples.new" / "images").mkdir(parents=True)
    (tmp_path / ".samples.new" / ".vflan").touch()
    (tmp_path / ".samples.new" / "images" / "1.png").write_bytes(b"half")
    folder = world.build(tmp_path, captions=60, per_kind=4, conversations=60, questions=0.15)
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "benchmarks",
        "benchmarks_more",
        "samples",
    ]
    assert (folder / "samples" / "flan.json").read_bytes() == (
        built / "samples" / "flan.json"
    ).read_bytes()


@pytest.mark.parametrize(
    "name", ["samples/thesis.txt", "benchmarks/images/me.jpg", ".samples.new/thesis.txt"]
)
def test_a_world_is_not_built_over_what_is_somebodys(built, tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("mine")
    (tmp_path / "samples.backup").mkdir()
    (tmp_path / "samples.backup" / "flan.json").write_text("mine")
    with pytest.raises(
        FileExistsError, match="holds what vflan did not write: .* Nothing was deleted"
    ):
        world.build(tmp_path, captions=60, per_kind=4, conversations=60, questions=0.15)
    assert (
        (tmp_path / name).read_text()
        == (tmp_path / "samples.backup" / "flan.json").read_text()
        == "mine"
    )


def test_another_draw_holds_out_other_kinds_but_never_those_that_benchmarks_ask_in_their_words():
    from vflan.world.tasks import ASKED, kinds

    declared, drawn = kinds(), kinds(7)
    assert [k.name for k in drawn] == [k.name for k in declared] and drawn == kinds(7) != kinds(8)
    out = [{k.name for k in some if k.split == "heldout"} for some in (declared, drawn)]
    assert out[0] != out[1]
    assert sum(k.split == "heldout" and k.name not in ASKED for k in declared) == len(
        out[1] - set(ASKED)
    )
    new_in_both = {k.name for k in declared if not k.in_text}
    assert new_in_both <= out[0] & out[1]
    assert {k.name: k.split for k in declared if k.name in ASKED} == {
        k.name: k.split for k in drawn if k.name in ASKED
    }


def test_a_world_with_another_draw_trains_on_no_held_out_kind(tmp_path):
    from vflan.world import build
    from vflan.world.tasks import kinds

    folder = build(
        tmp_path / "world",
        seed=3,
        captions=2,
        per_kind=1,
        conversations=2,
        questions=0.01,
        redraw=7,
    )
    held_out = {k.name for k in kinds(7) if k.split == "heldout"}
    trained = {
        row["task_name"] for row in json.loads((folder / "samples" / "flan.json").read_text())
    }
    asked = {
        json.loads(line)["category"]
        for line in (folder / "benchmarks/heldout/questions.jsonl").open()
    }
    assert not trained & held_out and asked == held_out
