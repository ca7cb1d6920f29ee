"""The benchmark for GPUs on a CPU, at tiny shapes.

It writes each figure when it is known, and goes on after a step that fails.
"""

import json
import sys
import time

import pytest

from bench import gpu


@pytest.fixture
def dry(tmp_path, monkeypatch):
    """dry("step", ...) runs steps on the CPU and returns the record and the exit's message."""
    monkeypatch.setenv("VFLAN_CACHE", str(tmp_path / "cache"))

    def run(*steps):
        out = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--out", str(out), "--only", *steps])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        return json.loads(out.read_text()), ended.value.code

    return run


def test_steps_run_on_a_cpu_and_their_figures_are_recorded(dry):
    record, code = dry("matmul", "packed", "full", "evaluation")
    rows = {row["name"]: row for row in record["checks"]}
    assert code == 0 and record["notes"]["failed"] == {}
    assert rows["packed_error_fp32"]["holds"] and rows["full_tokens_s"]["value"] > 0
    assert rows["evaluate_speedup"]["value"] > 1 and rows["full_gb"]["value"] == "not measured"


def test_after_a_step_that_fails_or_takes_too_long_the_others_run(dry, monkeypatch):
    def late(bench):
        bench.figures.put("tiny_works", 1)
        time.sleep(60)

    monkeypatch.setitem(gpu.BOXES, "tiny", 0.2)
    monkeypatch.setattr(gpu.Bench, "tiny", late)
    monkeypatch.setattr(gpu.Bench, "packed", lambda bench: 1 / 0)
    record, code = dry("tiny", "packed", "matmul")
    failed = record["notes"]["failed"]
    assert "not finished within" in failed["tiny"] and "ZeroDivisionError" in failed["packed"]
    assert [row["name"] for row in record["checks"]] == ["matmul_tflops", "tiny_works"]
    assert code == "Steps that failed: tiny, packed."


def test_it_imports_without_datasets_and_with_an_older_transformers(monkeypatch):
    from transformers import PreTrainedModel

    monkeypatch.setitem(sys.modules, "datasets", None)
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable")
    gpu.guards()
    assert sys.modules["datasets"].Dataset and PreTrainedModel.activation_checkpointing_enable
