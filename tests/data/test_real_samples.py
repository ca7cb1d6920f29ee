"""Real Vision-Flan records with their images, one a task.

They may not be published; without them these tests are skipped.
"""

import zipfile

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


def test_every_real_sample_passes_the_check_from_a_zip(real, tmp_path):
    with zipfile.ZipFile(tmp_path / "image_191-task_1k.zip", "w") as archive:
        for picture in (real / "images").iterdir():
            archive.write(picture, f"images_191task_1k/{picture.name}")
    (tmp_path / "annotation.json").write_bytes((real / "annotation.json").read_bytes())
    samples = vflan.load_samples(tmp_path / "annotation.json")
    assert (
        all(".zip::" in image for image in samples["image"])
        and len(set(samples["task_name"])) == 158
    )
    report = vflan.check(samples)
    assert (report.rows, report.ok, len(report.repaired)) == (158, 158, 0), report


def test_a_few_dozen_steps_on_real_samples_lower_the_loss(real, recipe):
    changes = dict(
        samples=str(real / "annotation.json"), images=str(real / "images"), lr=3e-3, max_steps=40
    )
    run = vflan.train(vflan.replace(recipe, **changes))
    loss = run.metrics().loss
    assert run.summary["rows"] == 158 and loss[-5:].mean() < 0.8 * loss[0]
