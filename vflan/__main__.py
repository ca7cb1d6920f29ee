"""The command line: `vflan COMMAND --help`, or `python -m vflan COMMAND --help`.

Each command is a thin call of a public function. An error that has a sentence ends the command with that sentence.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

import vflan

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Vision-Flan: visual instruction tuning in two stages, from raw samples to figures.",
)
PRESET = "tiny, tiny_frozen, qlora_7b, lora_7b, full_7b, full_13b, or a .py file of your own"
STAGE = "projector, base or chat"
PresetName = Annotated[str, typer.Argument(metavar="PRESET", help=PRESET)]
Stage = Annotated[str, typer.Option(help=STAGE)]
Changes = Annotated[
    str, typer.Option(help='fields to change, as JSON: \'{"max_steps": 40, "runs": "runs/mine"}\'')
]


def recipe_of(name: str, stage: str, changes: str = "{}"):
    """The recipe of one stage of a preset; ValueError for a stage that there is not."""
    stages = vflan.preset(name, changes)
    if stage not in stages._fields:
        raise ValueError(f"--stage {stage}: there are {', '.join(stages._fields)}.")
    return getattr(stages, stage)


@app.command()
def notebooks(
    preset: PresetName = "tiny",
    only: Annotated[
        list[str], typer.Option("--notebooks", metavar="03", help="only these (start of the name)")
    ] = (),
    parameters: Annotated[
        list[str], typer.Option("-p", metavar="KEY VALUE", help="a parameter of notebooks")
    ] = (),
    out: Annotated[
        str | None, typer.Option(help="folder for the executed notebooks and the report")
    ] = None,
    again: Annotated[
        bool, typer.Option(help="run also the notebooks of which nothing has changed")
    ] = False,
):
    """Run the notebooks of a preset in order; prints the scores and writes a report."""
    from vflan.tools.notebooks import press

    for given in parameters:
        if "=" not in given:
            raise ValueError(f"-p {given}: write -p KEY VALUE, or -p KEY=VALUE.")
    press(preset, only, dict(given.split("=", 1) for given in parameters), out, again=again)


@app.command()
def doctor(
    presets: Annotated[list[str] | None, typer.Argument(metavar="[PRESET]...", help=PRESET)] = None,
):
    """Say what this machine has, and what each preset lacks here."""
    from vflan.tools.doctor import examine

    raise SystemExit(examine(presets))


@app.command()
def plan(
    preset: PresetName,
    stage: Stage = "base",
    gpus: Annotated[int, typer.Option(help="how many")] = 1,
    gpu: Annotated[
        str, typer.Option(help="A100-80G, H100-80G, L40S-48G, RTX4090-24G ..., or cpu")
    ] = "A100-80G",
    changes: Changes = "{}",
):
    """Memory, hours and energy of a stage, before it is started."""
    print(vflan.plan(recipe_of(preset, stage, changes), gpus=gpus, gpu=gpu))


@app.command()
def check(
    samples: Annotated[str, typer.Argument(help="a LLaVA json, or a folder of Vision-Flan")],
    images: Annotated[str, typer.Argument(help="folder or zip of the pictures")],
    against: Annotated[
        str | None, typer.Option(help="folder of benchmarks: look for their pictures too")
    ] = None,
    max_length: Annotated[
        int, typer.Option(help="tokens of a conversation; a longer one is cut")
    ] = 2048,
):
    """Judge every row and picture by the rules of training; nothing is changed."""
    print(vflan.check(vflan.load_samples(samples, images), max_length=max_length, against=against))


@app.command()
def train(
    preset: Annotated[
        str, typer.Argument(metavar="PRESET", help=f"{PRESET}; under torchrun, a run's folder")
    ],
    stage: Stage = "base",
    init: Annotated[
        str | None, typer.Option(help="a finished run's folder, or LLaVA's projector file")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="GPUs, or processes on a CPU")] = None,
    changes: Changes = "{}",
):
    """Train one stage; a finished run is not trained again, a killed one goes on."""
    if (Path(preset) / "recipe.json").is_file():
        from vflan.training.distributed import end_with_parent
        from vflan.training.trainer import fit

        end_with_parent()
        fit(preset, processes)
        return
    print(vflan.train(recipe_of(preset, stage, changes), init, processes or 1).folder)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="a finished run's folder")],
    benchmarks: Annotated[
        list[str] | None, typer.Argument(help="all of the folder, if none is named")
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="folder of the benchmarks; default: the recipe's")
    ] = None,
    processes: Annotated[int, typer.Option(help="GPUs, or processes on a CPU")] = 1,
):
    """Ask a model the questions of benchmarks and print its scores as csv."""
    scores = vflan.evaluate(run, benchmarks, folder, num_processes=processes)
    scores.to_csv(sys.stdout, index=False, float_format="%.2f")


@app.command()
def score(
    name: Annotated[str, typer.Argument(help="a benchmark: pope, mme, mmbench, gqa ...")],
    questions: Annotated[
        str, typer.Option(help="the released question file (or MME's, MNIST's folder)")
    ],
    labels: Annotated[
        str | None, typer.Option(help="file or folder of the labels; default: beside them")
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="JSON Lines with question_id and text, or upload format")
    ] = None,
    reviews: Annotated[
        list[str], typer.Option(help="released verdicts of a judge, a file for each run")
    ] = (),
):
    """Score a file of answers, from any model, with the files that the benchmark's authors released.

    Prints one json object: the metrics in percent (MME's points on their own scale), `n` questions scored, and
    `problems`: how many answers are missing, belong to no question (unknown), are there twice (duplicate) or empty,
    how many labels are not known, how many lines are not json. Their ids are listed on stderr.
    """
    from vflan.evaluation.benchmarks.command import run

    raise SystemExit(run(name, questions, answers, labels, reviews))


@app.command()
def upload(
    name: Annotated[
        str,
        typer.Argument(help="a benchmark that has a server: vqav2, vizwiz, mmbench, mm_vet ..."),
    ],
    run: Annotated[str, typer.Option(help="folder of a run that vflan.evaluate has asked")],
    folder: Annotated[
        str | None, typer.Option(help="folder of the benchmarks; default: the recipe's")
    ] = None,
    out: Annotated[str | None, typer.Option(help="the file to write")] = None,
):
    """Write a run's answers in the form that the benchmark's server takes."""
    from vflan.evaluation.evaluator import write_upload

    print(write_upload(name, run, folder, out))


@app.command()
def download(
    name: Annotated[
        str | None, typer.Argument(help="a set; without a name they are listed")
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="instead of the set's own folder under data/")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="the sets, and what remains to be done")
    ] = False,
):
    """Download a real set from the Hugging Face hub."""
    from vflan.config import shown
    from vflan.data.download import SETS

    if list_ or not name:
        for known, data in SETS.items():
            print(f"{known:16} {data.repo:36} -> {data.folder}; {data.then}")
        return
    print(f"{shown(vflan.fetch(name, folder))}: {SETS[name].then}")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="a finished run's folder")],
    folder: Annotated[str, typer.Argument(help="a new folder")],
    merge: Annotated[
        bool, typer.Option(help="one model; --no-merge gives a LoRA adapter alone")
    ] = True,
):
    """Write a run as a folder for transformers and vLLM, with a model card."""
    print(vflan.Run.open(run).export(folder, merge))


@app.command(hidden=True)
def publish(
    preset: Annotated[str, typer.Argument(help="tiny or tiny_frozen")] = "tiny",
    readme: Annotated[bool, typer.Option(help="only fill the tables of README.md and docs/")] = False,
):
    """For the authors: copy a finished run's notebooks, figures and results to what git tracks."""
    from vflan.analysis.tables import fill_pages
    from vflan.config import shown
    from vflan.tools.publish import publish as copied

    if readme:
        print("filled:", ", ".join(fill_pages()) or "nothing, there are no results yet")
        return
    for path in copied(preset):
        print(shown(path))


@app.command("tag", hidden=True)
def tag_notebooks(
    paths: Annotated[
        list[str] | None, typer.Argument(help="notebooks; all if none is named")
    ] = None,
):
    """For the authors: tag the notebook cells that say the same on every machine, so that nbval compares them."""
    from vflan.tools.stable import tag_files

    tag_files(paths)


def spelled_out(arguments: list[str]) -> list[str]:
    """papermill's `-p KEY VALUE` as `-p KEY=VALUE`, and an option for each value of `--notebooks 02 05` and `--reviews`."""
    rest, out = list(arguments), []
    while rest:
        word = rest.pop(0)
        if word == "-p" and len(rest) > 1 and "=" not in rest[0]:
            out += ["-p", f"{rest.pop(0)}={rest.pop(0)}"]
        elif word in ("--notebooks", "--reviews") and rest and not rest[0].startswith("-"):
            while rest and not rest[0].startswith("-"):
                out += [word, rest.pop(0)]
        else:
            out.append(word)
    return out


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; what can be said in a sentence goes to stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(spelled_out(arguments), prog_name="vflan")
    except SystemExit as error:
        return error.code or 0
    except (OSError, ValueError, RuntimeError) as error:
        print(f"vflan {arguments[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
