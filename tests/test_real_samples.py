"""Real Vision-Flan records, one a task, with their pictures. They may not be published, so without them these tests are skipped."""

import pytest

import vflan


@pytest.fixture
def real(shared):
    if not (shared / "vision_flan_samples").is_dir():
        pytest.skip("needs shared/vision_flan_samples beside the repository")
    return shared / "vision_flan_samples"


def test_every_real_sample_passes_the_check(real):
    report = vflan.check(vflan.load_samples(real / "annotation.json", real / "images"))
    assert (report.rows, report.ok, len(report.repaired)) == (158, 158, 0), report


def test_a_few_dozen_steps_on_real_samples_lower_the_loss(real, recipe):
    changes = dict(samples=str(real / "annotation.json"), images=str(real / "images"), lr=3e-3, max_steps=40)
    run = vflan.train(vflan.replace(recipe, **changes))
    loss = run.metrics().loss
    assert run.summary["rows"] == 158 and loss[-5:].mean() < 0.8 * loss[0]
