"""The command line: `vflan COMMAND --help`, or `python -m vflan COMMAND --help`.

Each command calls a public function. An expected error ends the command with its sentence.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

import vflan
from vflan.config import Recipe, shown
from vflan.escape import for_terminal, write_sheet
from vflan.io import machine_limit, require_memory

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Vision-Flan: visual instruction tuning in two stages, from raw samples to figures.",
)
NEED_TORCH = "notebooks doctor plan train evaluate upload export publish".split()
PRESET = "tiny, tiny_frozen, smol, smol_real, qlora_7b, lora_7b, full_7b, full_13b, "
PRESET += "or a .py file of your own"
CHANGES = 'fields to change, as JSON: \'{"max_steps": 40, "runs": "runs/mine"}\''
ANSWERS = "JSON Lines with question_id and text, or the benchmark's upload format"
ALL_QUESTIONS = "vqav2: the file of all of test2015; default: beside the questions"
PresetName = Annotated[str, Argument(metavar="PRESET", help=PRESET)]
Stage = Annotated[str, Option(help="projector, base or chat")]
Changes = Annotated[str, Option(help=CHANGES)]
Processes = Annotated[int | None, Option(min=1, help="GPUs, or processes on a CPU")]
RunFolder = Annotated[str, Argument(help="a finished run's folder")]
BenchmarkFolder = Annotated[str | None, Option(help="of the benchmarks; default: the recipe's")]


def recipe_of(name: str, stage: str, changes: str = "{}") -> Recipe:
    """The recipe of one stage of a preset; ValueError for an unknown stage."""
    stages = vflan.preset(name, changes)
    if stage not in stages._fields:
        raise ValueError(f"--stage {stage}: there are {', '.join(stages._fields)}.")
    return getattr(stages, stage)


@app.command("notebooks")
def notebooks_command(
    preset: PresetName = "tiny",
    only: Annotated[list[str], Option("--notebooks", metavar="03", help="only these")] = (),
    parameters: Annotated[list[str], Option("-p", metavar="KEY VALUE", help="a parameter")] = (),
    out: Annotated[str | None, Option(help="folder for executed notebooks and report")] = None,
    again: Annotated[bool, Option(help="run also the notebooks that have not changed")] = False,
    keep: Annotated[str, Option(help="of further runs: model, adapter or nothing")] = "model",
) -> None:
    """Run the notebooks of a preset in order; prints the scores and writes a report."""
    from vflan.tools.notebooks import run_notebooks

    for given in parameters:
        if "=" not in given:
            raise ValueError(f"-p {given}: write -p KEY VALUE, or -p KEY=VALUE.")
    values = dict(given.split("=", 1) for given in parameters)
    run_notebooks(preset, only, values, out, again=again, keep=keep)


@app.command("doctor")
def doctor_command(
    presets: Annotated[list[str] | None, Argument(metavar="[PRESET]...", help=PRESET)] = None,
) -> None:
    """Say what this machine has, and what each preset lacks here."""
    from vflan.tools.doctor import examine

    raise SystemExit(examine(presets))


@app.command("plan")
def plan_command(
    preset: PresetName,
    stage: Annotated[str | None, Option(help="only projector, base or chat")] = None,
    gpus: Annotated[int | None, Option(min=1, help="default: as few as it takes")] = None,
    gpu: Annotated[str, Option(help="A100-80G, H100-80G, RTX4090-24G ..., or cpu")] = "A100-80G",
    changes: Changes = "{}",
    dollars_per_hour: Annotated[float | None, Option(help="the price of a GPU hour")] = None,
) -> None:
    """Hours, memory, disk and cost of a preset or of a stage, before it is started."""
    what = recipe_of(preset, stage, changes) if stage else vflan.preset(preset, changes)
    print(vflan.plan(what, gpus=gpus, gpu=gpu, dollars_per_hour=dollars_per_hour))


@app.command("check")
def check_command(
    samples: Annotated[str, Argument(help="a LLaVA json, or a folder of Vision-Flan")],
    images: Annotated[str, Argument(help="folder or zip of the pictures")],
    against: Annotated[str | None, Option(help="folder of benchmarks to compare with")] = None,
    max_length: Annotated[int, Option(min=2, help="tokens; a longer conversation is cut")] = 2048,
) -> None:
    """Judge every row and picture by the rules of training; nothing is changed."""
    rows = vflan.load_samples(samples, images)
    print(for_terminal(vflan.check(rows, max_length=max_length, against=against)))


@app.command("train")
def train_command(
    preset: PresetName,
    stage: Stage = "base",
    init: Annotated[str | None, Option(help="a run's folder, or LLaVA's projector file")] = None,
    processes: Processes = None,
    changes: Changes = "{}",
) -> None:
    """Train one stage; a finished run is not trained again, a killed one is resumed."""
    # torchrun starts this command in each process, with the run's folder in place of a preset.
    if (Path(preset) / "recipe.json").is_file():
        from vflan.training.distributed import end_with_parent
        from vflan.training.trainer import fit

        end_with_parent()
        fit(preset, processes)
        return
    print(vflan.train(recipe_of(preset, stage, changes), init, processes or 1).folder)


@app.command("evaluate")
def evaluate_command(
    run: RunFolder,
    benchmarks: Annotated[list[str] | None, Argument(help="all of the folder by default")] = None,
    folder: BenchmarkFolder = None,
    processes: Processes = 1,
) -> None:
    """Ask a model the questions of benchmarks and print its scores as csv."""
    scores = vflan.evaluate(run, benchmarks, folder, num_processes=processes)
    write_sheet(scores, sys.stdout, float_format="%.2f")


@app.command("score")
def score_command(
    name: Annotated[str, Argument(help="a benchmark: pope, mme, mmbench, gqa ...")],
    questions: Annotated[str, Option(help="the released file (or MME's, MNIST's folder)")],
    labels: Annotated[str | None, Option(help="file or folder; default: beside them")] = None,
    answers: Annotated[str | None, Option(help=ANSWERS)] = None,
    reviews: Annotated[list[str], Option(help="a judge's verdicts, one file or several")] = (),
    model: Annotated[str | None, Option(help="the row, if --reviews is a table of several")] = None,
) -> None:
    """Score a file of answers, from any model, with the files that a benchmark's authors released.

    Prints one JSON object: the metrics in percent (MME's points on their own scale), `n` questions
    scored, and `problems`: how many answers are missing, belong to no question (unknown), are there
    twice (duplicate) or empty, how many labels are not known, how many lines are not JSON. Their
    ids are listed on stderr. Several runs of a judge give their mean, `runs` and `std`.
    """
    from vflan.evaluation.benchmarks.command import run

    raise SystemExit(run(name, questions, answers, labels, reviews, model))


@app.command("upload")
def upload_command(
    name: Annotated[str, Argument(help="a benchmark with a server: vqav2, vizwiz, mm_vet ...")],
    run: Annotated[str, Option(help="folder of a run that vflan.evaluate has asked")],
    folder: BenchmarkFolder = None,
    out: Annotated[str | None, Option(help="the file to write, or a folder for it")] = None,
    all_questions: Annotated[str | None, Option(help=ALL_QUESTIONS)] = None,
    allow_missing: Annotated[bool, Option(help="a question without an answer gets ''")] = False,
    model: Annotated[
        str | None, Option(help="another model that was asked under this name")
    ] = None,
) -> None:
    """Write a run's answers in the form that the benchmark's server takes.

    There is one for vqav2, gqa, vizwiz, mmbench, mmbench_cn, seed, mm_vet, mme and mmmu. An
    unfinished evaluation is refused, and so is a question that failed, unless --allow-missing.
    """
    from vflan.evaluation.results import write_upload

    print(write_upload(name, run, folder, out, all_questions, allow_missing, model))


@app.command("download")
def download_command(
    name: Annotated[str | None, Argument(help="a set; without a name they are listed")] = None,
    folder: Annotated[str | None, Option(help="default: the set's folder under data/")] = None,
    list_: Annotated[bool, Option("--list", help="the sets, and what remains to be done")] = False,
) -> None:
    """Download a real set from the Hugging Face hub."""
    from vflan.data.download import SETS

    if list_ or not name:
        for known, data in SETS.items():
            print(f"{known:16} {data.repo:36} -> {data.folder}; {data.then}")
        return
    print(f"{shown(vflan.fetch(name, folder))}: {SETS[name].then}")


@app.command("export")
def export_command(
    run: RunFolder,
    folder: Annotated[str, Argument(help="a new folder")],
    merge: Annotated[bool, Option(help="one model, or a LoRA adapter alone")] = True,
) -> None:
    """Write a run as a folder for transformers and vLLM, with a model card."""
    print(vflan.Run.open(run).export(folder, merge))


@app.command("publish", hidden=True)
def publish_command(
    preset: Annotated[str, Argument(help="tiny or tiny_frozen")] = "tiny",
    readme: Annotated[bool, Option(help="only fill the tables of README.md and docs/")] = False,
) -> None:
    """For the authors: copy a finished run's notebooks, figures and results to tracked files."""
    from vflan.analysis.tables import fill_pages
    from vflan.tools.publish import publish_run

    if readme:
        print("filled:", ", ".join(fill_pages()) or "nothing, there are no results yet")
        return
    for path in publish_run(preset):
        print(shown(path))


@app.command("tag", hidden=True)
def tag_command(
    paths: Annotated[list[str] | None, Argument(help="notebooks; default: all")] = None,
) -> None:
    """For the authors: tag the cells with the same output on every machine, for nbval."""
    from vflan.tools.stable import tag_files

    tag_files(paths)


def spelled_out(arguments: list[str]) -> list[str]:
    """Rewrite what typer does not read.

    papermill's `-p KEY VALUE` becomes `-p KEY=VALUE`, and `--notebooks 02 05` an option for each
    value; so does `--reviews`.
    """
    rest, written = list(arguments), []
    while rest:
        word = rest.pop(0)
        if word == "-p" and len(rest) > 1 and "=" not in rest[0]:
            written += ["-p", f"{rest.pop(0)}={rest.pop(0)}"]
        elif word in ("--notebooks", "--reviews") and rest and not rest[0].startswith("-"):
            while rest and not rest[0].startswith("-"):
                written += [word, rest.pop(0)]
        else:
            written.append(word)
    return written


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; expected errors go to stderr as a sentence."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in NEED_TORCH:
            require_memory()
        app(spelled_out(arguments), prog_name="vflan")
    except SystemExit as error:
        return error.code or 0
    except (OSError, ValueError, RuntimeError, ImportError, ArithmeticError, MemoryError) as error:
        sentence = str(error)
        # Each library has words of its own, and often many lines, for too little memory or disk.
        if limit := machine_limit(error):
            sentence = f"{(sentence or 'MemoryError').splitlines()[0][:300]} - {limit}"
        print(f"vflan {arguments[0]}: {for_terminal(sentence)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
