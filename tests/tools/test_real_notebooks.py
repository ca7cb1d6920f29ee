"""Notebooks 02 to 08 run on real folders, in 4 bits and in bf16: not one cell fails.

The folders are tiny stand-ins (tests/real_folders.py), and a CPU takes the place of the GPU: it
computes in bf16, packs rows and trains one arm after the other, as a GPU would. papermill fills in
the parameters. The cells run in this process, so that the CPU can be told to do so.
"""

import ast

import matplotlib.pyplot as plt
import papermill
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from papermill.engines import Engine, papermill_engines
from real_folders import make_clip, make_data, make_language_model, make_projector, make_smollm

from vflan.config import ROOT
from vflan.training.run import Run

PRESET = """
from vflan.config import Preset, replace
from vflan.presets.{name} import preset as real


def preset():
    files = [f"{samples}/{{name}}.json" for name in ("captions", "flan", "chat")]
    changes = {changes}
    recipes = [replace(r, samples=file, **changes) for r, file in zip(real(), files)]
    return Preset(*recipes[:2], replace(recipes[2], num_samples=20))
"""
FEW = dict(budgets=[60, 30], num_tasks=[2, 4, 8, 20], instances=[60], budget=60)


class InThisProcess(Engine):
    """Runs the cells of a notebook one after the other, and shows what they would show."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        show = DisplayFormatter().format
        names = {"display": lambda *values: [show(value) for value in values]}
        for number, cell in enumerate(nb_man.nb.cells):
            if cell.cell_type != "code":
                continue
            tree, names["_last"] = ast.parse(cell.source), None
            # What a cell ends with is shown.
            if tree.body and isinstance(tree.body[-1], ast.Expr):
                target = ast.Name("_last", ast.Store())
                tree.body[-1] = ast.Assign([target], tree.body[-1].value)
            try:
                exec(compile(ast.fix_missing_locations(tree), f"cell {number}", "exec"), names)
                show(names["_last"])
            except Exception as error:
                error.add_note(f"in cell {number}:\n{cell.source}")
                raise
            finally:
                plt.close("all")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the stand-ins: language models, clip, projector, samples, benchmarks."""
    folder = tmp_path_factory.mktemp("real")
    make_language_model(folder / "vicuna", seed=1)
    make_language_model(folder / "llama_chat", seed=2)
    make_smollm(folder / "smollm", seed=1)
    make_smollm(folder / "smollm_base", seed=2)
    make_clip(folder / "clip")
    make_projector(folder / "llava" / "mm_projector.bin")
    make_data(folder)
    return folder


@pytest.fixture
def like_a_gpu(monkeypatch):
    """bf16 and one arm after the other, as on a GPU. The CPU has no packed kernel of its own."""

    def dtype(recipe):
        return torch.bfloat16 if recipe.precision == "bf16" else torch.float32

    for module in ("quantisation", "llava"):
        monkeypatch.setattr(f"vflan.models.{module}.compute_dtype", dtype)
    monkeypatch.setattr("vflan.models.loss.packed_attention", lambda dtype: "by_conversation")
    monkeypatch.setattr("vflan.analysis.sweeps.default_jobs", lambda: 1)
    monkeypatch.setattr(papermill_engines, "_engines", {"here": InThisProcess})


def preset_file(home, name, runs):
    changes = dict(
        language_model=str(home / ("smollm" if name.startswith("smol") else "vicuna")),
        vision_tower=str(home / "clip"),
        images=str(home / "world" / "samples" / "images"),
        benchmarks=str(home / "benchmarks"),
        runs=str(runs),
        device="cpu",
        packing="packed",
        num_samples=None,
        global_batch=4,
        micro_batch=2,
    )
    path = runs.parent / f"{name}.py"
    samples = home / "world" / "samples"
    path.write_text(PRESET.format(name=name, samples=samples, changes=changes))
    return path


def walk(path, start, **parameters):
    (notebook,) = (ROOT / "notebooks").glob(f"{start}_*.ipynb")
    known = papermill.inspect_notebook(str(notebook))
    given = {name: value for name, value in parameters.items() if name in known}
    papermill.execute_notebook(
        str(notebook),
        str(path.with_name(f"{start}.ipynb")),
        parameters=dict(preset=str(path), changes={"max_steps": 2}, **given),
        engine_name="here",
        progress_bar=False,
    )


@pytest.mark.parametrize("name", ["smol", "smol_real"])
def test_no_cell_fails_with_a_language_model_of_another_family(home, like_a_gpu, tmp_path, name):
    """Tied weights, and a tokenizer that puts no token before a text; `smol` in fp32."""
    path, more = preset_file(home, name, tmp_path / "runs"), dict(FEW)
    more["other_language_model"] = str(home / "smollm_base")
    for start in ("02", "03", "04", "05", "06", "07", "08"):
        walk(path, start, live="small", **more)
    recipes = [Run(done.parent).recipe for done in tmp_path.glob("runs/*/done.json")]
    assert {"projector", "base", "chat", "only-projector-of-60"} <= {r.name for r in recipes}
    assert {r.precision for r in recipes} == {"fp32" if name == "smol" else "bf16"}


@pytest.mark.parametrize("name, bits", [("qlora_7b", 4), ("full_7b", 16)])
def test_no_cell_of_notebooks_02_to_08_fails(home, like_a_gpu, tmp_path, name, bits):
    """In 4 bits from LLaVA's projector; in bf16 from one trained here, with all arms of 07."""
    path, more = preset_file(home, name, tmp_path / "runs"), dict(FEW)
    more["other_language_model"] = str(home / "llama_chat")
    if bits == 4:
        more["projector"] = str(home / "llava" / "mm_projector.bin")
    for start in ("02", "03", "04", "05", "06", "07", "08"):
        live = "all" if (start, bits) == ("07", 16) else "small"
        walk(path, start, live=live, **more)
    runs = [Run(done.parent) for done in tmp_path.glob("runs/*/done.json")]
    steps = {run.name: run.summary["steps"] for run in runs}
    # `changes: {max_steps: 2}` holds for every arm.
    assert steps.pop("projector") == (0 if bits == 4 else 2) and set(steps.values()) == {2}
    assert {"base", "chat", "only-projector-of-60"} <= set(steps)
    assert bits == 4 or {"one-stage", "chat-60-from-projector"} <= set(steps)
    assert {run.recipe.bits for run in runs} == {bits}
