"""The bench for GPUs runs on a CPU at tiny shapes, writes each figure when it is known, and outlives a step that fails."""

import json
import sys
import time

import pytest

from bench import gpu


@pytest.fixture
def dry(tmp_path, monkeypatch):
    """Run some steps dry; returns the record, and the exit's message."""
    monkeypatch.setenv("VFLAN_CACHE", str(tmp_path / "cache"))

    def run(*steps):
        out = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--out", str(out), "--only", *steps])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        return json.loads(out.read_text()), ended.value.code

    return run


def test_the_steps_run_dry_and_their_figures_stand_in_the_record(dry):
    record, code = dry("matmul", "packed", "full", "evaluation")
    found = {row["name"]: row for row in record["checks"]}
    assert code == 0 and record["notes"]["failed"] == {}
    assert found["packed_error_fp32"]["holds"] and found["full_tokens_s"]["value"] > 0
    assert found["evaluate_speedup"]["value"] > 1 and found["full_gb"]["value"] == "not measured"


def test_a_step_that_fails_or_takes_too_long_does_not_end_the_rest(dry, monkeypatch):
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


def test_without_datasets_and_with_an_older_transformers_it_still_imports(monkeypatch):
    from transformers import PreTrainedModel

    monkeypatch.setitem(sys.modules, "datasets", None)
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable")
    gpu.guards()
    assert sys.modules["datasets"].Dataset and PreTrainedModel.activation_checkpointing_enable
