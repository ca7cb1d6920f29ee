"""The papers' numbers and the task names: complete, unambiguous, marked where not confirmed."""

import re

from vflan.analysis.plots import paper, paper_tasks, printed, task_list


def rows(item, column="MMB", source="vision-flan"):
    table = paper()
    return (
        table[(table.paper == source) & (table.item == item) & (table.column == column)]
        .set_index("row")
        .value.astype(float)
    )


def test_every_number_stands_once_and_says_how_well_it_is_known():
    table = paper()
    assert list(table.columns) == [
        "paper",
        "item",
        "row",
        "column",
        "value",
        "unit",
        "confirmed",
        "note",
    ]
    named = table[table.item != "Figures 5 to 8"]
    assert not named.duplicated(["paper", "item", "row", "column"]).any()
    assert set(table.confirmed) == {"yes", "memory", "inferred", "third-party"}
    assert table.value.astype(float).notna().all()
    assert (table[table.confirmed != "yes"].note != "").all()


def test_the_tables_of_the_paper_are_all_there():
    sizes = {"Table 2": 9, "Table 3": 4, "Table 5": 4, "Table 6": 4, "Table 7": 8}
    assert {item: len(rows(item)) for item in sizes} == sizes
    assert len(rows("Table 4", "MME")) == 3 and len(rows("Table 1", "instances")) == 9
    assert (
        len(rows("Table 3", "MME", "llava-1.5")) == 4
        and len(rows("Table 7", "samples", "llava-1.5")) == 10
    )


def test_numbers_that_the_paper_prints_twice_agree():
    mmb = {item: rows(item) for item in ("Table 2", "Table 5", "Table 6", "Table 7")}
    assert (
        mmb["Table 2"]["Vision-Flan Base"]
        == mmb["Table 5"]["LLM tuned, MLP tuned"]
        == mmb["Table 6"]["Base"]
        == 69.8
    )
    assert (
        mmb["Table 2"]["Vision-Flan Chat"]
        == mmb["Table 6"]["Chat"]
        == mmb["Table 7"]["Chat"]
        == 67.6
    )
    assert (
        rows("Table 4", "LLaVA-Bench")["two-stage, 1,000"]
        == rows("Table 2", "LLaVA-Bench")["Vision-Flan Chat"]
        == 78.3
    )


def test_what_nobody_confirmed_is_marked_so():
    assert printed("Table 2", "Vision-Flan Base", "CF") == (87.2, False)
    assert printed("Table 2", "Vision-Flan Base", "MME") == (1537.8 / 20, True)
    assert printed("Table 2", "Vision-Flan Base", "GQA") is None


def test_all_205_names_of_the_site_are_listed_once():
    tasks = task_list()
    site = tasks[tasks.in_site == "yes"]
    assert len(site) == 205 and site.task_name.is_unique and (site.task_name != "").all()
    assert (site.source == "MultiInstruct").sum() == 26
    assert set(tasks.in_191) == {"yes", ""} and (site.in_191 == "yes").sum() == 32
    assert (tasks[tasks.in_paper == "no"].note != "").all()


def test_the_papers_188_tasks_fall_into_25_categories_of_three_groups():
    tasks = paper_tasks()
    assert len(tasks) == 188 and tasks.category.nunique() == 25
    assert tasks.group.value_counts().to_dict() == {
        "classification": 103,
        "generation": 44,
        "question answering": 41,
    }
    assert rows("Figure 2", "tasks").to_dict() == tasks.group.value_counts().to_dict()


def test_the_sources_agree_with_the_names():
    tasks = task_list()
    for row in tasks[tasks.task_name.str.contains("+", regex=False)].itertuples():
        assert row.source in (re.split(r"\+", row.task_name)[0], "CAT2000")


def test_flags_and_licences_are_known_words():
    tasks = task_list()
    flags = tasks["flags"].str.split()  # tasks.flags is pandas' own
    assert set(flags.explode().dropna()) == {"benchmark", "overlaps", "faces"}
    assert set(tasks.licence) - {""} <= {
        *(
            "CC0-1.0",
            "CC-BY-4.0",
            "CC-BY-SA-3.0",
            "CC-BY-NC-4.0",
            "CC-BY-NC-SA-4.0",
            "CC-BY (annotations)",
        ),
        *("MIT", "Apache-2.0", "BSD-3-Clause", "GPL-3.0", "DbCL-1.0"),
        *("free with credit", "research only", "no redistribution", "own terms"),
    }


def test_a_source_has_one_licence_and_the_facts_are_in_the_table():
    tasks = task_list()
    by_source = tasks[tasks.source != "MultiInstruct"].groupby("source").licence
    assert (by_source.nunique() == 1).all()
    licence = by_source.first()
    assert (
        licence["Clevr"] == licence["visdial"] == "CC-BY-4.0"
        and licence["MEMOTION"] == "no redistribution"
    )
    assert (
        licence["INATURALIST"] == "research only" and licence["coco"] == ""
    )  # not stated on the site
    named = tasks[tasks["flags"].str.contains("benchmark")].source
    known = {
        "ImageNet-A",
        "ImageNet-C",
        "ImageNet-R",
        "ObjectNet",
        "Winoground",
        "VisDA-2017",
        "MVTecAD",
        "Set5",
        "Road-Anomaly",
    }
    assert set(named) == known | {"NOCAPS"}
    assert {"fairface", "LFW", "expw", "KVQA"} < set(
        tasks[tasks["flags"].str.contains("faces")].source
    )
