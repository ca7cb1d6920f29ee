"""A finished run gives up its model: what stays, what is refused, and that nothing else is lost."""

import json

import pytest

import vflan
from tests.analysis.test_sweeps import small  # noqa: F401
from vflan.config import differences, replace
from vflan.tools.keeping import keep_in_all
from vflan.training.run import Run

LORA = dict(lora_r=4, lora_alpha=8)


@pytest.fixture
def run(recipe, small):  # noqa: F811
    """A finished LoRA run with answers to eight questions."""
    run = vflan.train(replace(small[1], name="lora", **LORA))
    vflan.evaluate(run)
    return run


def weights(run):
    return {path.parent.name for path in run.folder.glob("*/*.safetensors")}


def test_the_adapter_stays_and_the_model_goes(run):
    assert weights(run) == {"model", "adapter"}
    assert weights(run.keep("model")) == {"model", "adapter"}
    assert weights(run.keep("adapter")) == {"adapter"}
    assert weights(run.keep("nothing")) == set()
    with pytest.raises(ValueError, match="lora has no adapter"):
        run.keep("adapter")
    with pytest.raises(ValueError, match="keep='all': choose one of model, adapter, nothing"):
        run.keep("all")


def test_answers_are_scored_again_and_the_run_is_still_finished(run, monkeypatch):
    before, losses = vflan.evaluate(run), run.metrics()
    run.keep("nothing")
    after = vflan.evaluate(run)
    assert after.value.equals(before.value) and run.metrics().equals(losses)
    assert vflan.train(run.recipe).finished and run.processor()


@pytest.mark.parametrize("what", ["adapter", "nothing"])
def test_whatever_needs_the_model_says_what_to_do(run, small, tmp_path, what):  # noqa: F811
    run.keep(what)
    (run.folder / "answers" / "heldin.jsonl").unlink()
    after = replace(run.recipe, name="after", lora_r=0)
    needs = [
        run.load_model,
        lambda: vflan.evaluate(run),
        lambda: vflan.train(after, init=run),
        lambda: vflan.load_model(run.recipe, run.folder / "model"),
        lambda: run.export(tmp_path / "out"),
    ]
    for use in needs:
        with pytest.raises(FileNotFoundError, match=f"was deleted .keep='{what}'.*train the run"):
            use()
    assert not (tmp_path / "out").exists()
    assert what == "nothing" or run.export(tmp_path / "adapter", merge=False)


def test_files_of_others_stay_and_nothing_is_deleted(run, tmp_path):
    theirs = run.folder / "model" / "thesis.txt"
    theirs.write_text("three years of work")
    with pytest.raises(FileExistsError, match="thesis.txt.*Nothing was deleted"):
        run.keep("nothing")
    assert weights(run) == {"model", "adapter"} and "kept" not in run.summary
    theirs.unlink()
    (run.folder / "model").rename(tmp_path / "elsewhere")
    (run.folder / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="is a link"):
        run.keep("nothing")
    assert list((tmp_path / "elsewhere").glob("*.safetensors"))


def test_a_process_killed_while_it_deletes_leaves_no_half_model(run, monkeypatch):
    from pathlib import Path

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.keep("nothing")
    with pytest.raises(FileNotFoundError, match="was deleted"):
        run.load_model()
    assert weights(run.keep("nothing")) == set() and len(vflan.evaluate(run))


def test_an_unfinished_run_keeps_everything(recipe):
    with pytest.raises(FileNotFoundError, match="train it first"):
        Run.open(recipe.folder).keep("nothing")


def test_what_is_kept_is_no_part_of_the_recipe(run):
    before = json.loads((run.folder / "recipe.json").read_text())
    run.keep("nothing")
    after = json.loads((run.folder / "recipe.json").read_text())
    assert before == after and not differences(before, after)


def test_a_sweep_drops_the_models_that_no_arm_needs(small):  # noqa: F811
    projector, base, _ = small
    arms = {
        "projector": vflan.Arm(projector),
        "lora": vflan.Arm(replace(base, name="lora", **LORA), init="projector"),
        "full": vflan.Arm(replace(base, name="full"), init="projector"),
        "asked nothing": vflan.Arm(replace(base, name="quiet"), init="projector", benchmarks=()),
    }
    with pytest.raises(ValueError, match="keep='all'"):
        vflan.sweep(arms, jobs=1, keep="all")
    done = vflan.sweep(arms, jobs=1, keep="adapter")
    kept = {label: weights(run) for (label, _), run in done.runs.items()}
    assert kept["lora"] == {"adapter"} and kept["full"] == {"model"}
    again = vflan.sweep(arms, jobs=1, keep="nothing")
    # These runs were there before, so that this call deletes nothing.
    assert weights(done.runs["full", 0]) == {"model"}
    assert again.scores.value.equals(done.scores.value)
    third = vflan.sweep({"new": vflan.Arm(replace(base, name="new"))}, jobs=1, keep="nothing")
    assert weights(third.runs["new", 0]) == set()
    assert weights(done.runs["projector", 0]) == weights(done.runs["asked nothing", 0]) == {"model"}


def test_a_run_of_two_labels_keeps_its_model_while_another_arm_needs_it(small):  # noqa: F811
    projector, base, _ = small
    arms = {
        "projector": vflan.Arm(projector),
        "the same": vflan.Arm(projector),
        "after": vflan.Arm(replace(base, name="after"), init="projector"),
    }
    done = vflan.sweep(arms, jobs=1, keep="nothing")
    assert weights(done.runs["projector", 0]) == {"model"}
    assert weights(done.runs["after", 0]) == set()


def test_the_stages_of_a_preset_keep_their_models(run, recipe):
    base = vflan.train(replace(recipe, name="base", max_steps=1))
    seed = vflan.train(replace(recipe, name="base-seed1", seed=1, max_steps=1))
    other = vflan.train(replace(recipe, name="other", max_steps=1))
    keep_in_all([run, base, seed, other], "adapter", ["projector", "base", "chat"])
    assert [weights(r) for r in (run, base, seed, other)] == [{"adapter"}, *[{"model"}] * 3]
    keep_in_all([run, base, seed, other], "nothing", ["projector", "base", "chat"])
    assert [weights(r) for r in (base, seed, other)] == [{"model"}, {"model"}, set()]
