"""A hub that does not answer is asked once, and costs seconds."""

from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

import vflan
from vflan.models import hub, weights


@pytest.fixture
def contacts(monkeypatch):
    """Lets the hub answer as `state.error` says; records each contact, and what was cached."""
    state = SimpleNamespace(error=None, asked=[], cached=None, read=[])

    def ask(url, timeout):
        state.asked.append((url, timeout))
        if state.error:
            raise state.error

    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, file: state.cached)
    hub._trouble.cache_clear()
    yield state
    hub._trouble.cache_clear()


class AutoAnything:
    """As a class of transformers, but says only how it was called."""

    @classmethod
    def from_pretrained(cls, source, **options):
        return source, options


TROUBLE = [httpx2.ConnectError("no route to host"), httpx2.ConnectTimeout("no route to host")]
TROUBLE += [httpx2.ReadError("no route to host"), OfflineModeIsEnabled("no route to host")]


@pytest.mark.parametrize("error", TROUBLE, ids=lambda error: type(error).__name__)
def test_a_model_that_cannot_be_had_is_one_sentence_after_one_short_question(contacts, error):
    contacts.error = error
    for _ in range(4):
        with pytest.raises(FileNotFoundError, match="^a/b: no such folder is here.*no route to"):
            weights.read_pretrained(AutoAnything, "a/b")
    assert len(contacts.asked) <= 2  # a minute may end in between
    assert all(url.endswith("/a/b/resolve/main/config.json") for url, _ in contacts.asked)
    assert all(timeout <= 5 for _, timeout in contacts.asked)


def test_a_downloaded_model_is_read_without_the_hub(contacts):
    contacts.error, contacts.cached = TROUBLE[0], "config.json"
    _, options = weights.read_pretrained(AutoAnything, "a/b")
    assert options["local_files_only"] is True


def test_a_hub_that_answers_is_left_to_transformers(contacts):
    """Also where it says that there is no such model: that takes no time."""
    assert hub.hub_options("a/b") == {}
    response = httpx2.Response(404, request=httpx2.Request("HEAD", "https://hub.invalid"))
    contacts.error = RepositoryNotFoundError("404", response=response)
    assert hub.hub_options("c/d") == {} and len(contacts.asked) == 2


def test_a_folder_is_read_without_a_contact(contacts, tmp_path):
    for source in (tmp_path, str(tmp_path), str(tmp_path / "nothing")):
        assert hub.hub_options(source) == {}
    assert not contacts.asked


@pytest.mark.parametrize("name", ["a b/c", "a/" + "b" * 300, "-a/b", "a/b.git"])
def test_what_can_be_no_name_of_the_hub_is_not_asked_for(monkeypatch, name):
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *_, **__: 1 / 0)
    with pytest.raises(FileNotFoundError, match="no such folder is here, and") as error:
        hub.hub_options(name)
    assert "\n" not in str(error.value)


def test_a_training_of_a_model_that_is_not_there_ends_before_any_row_is_read(
    recipe, contacts, monkeypatch
):
    contacts.error = TROUBLE[0]
    for name in ("language_model", "vision_tower"):
        wrong = vflan.replace(recipe, name=name, **{name: "a/b"})
        with pytest.raises((FileNotFoundError, ValueError), match="a/b: no such folder is here"):
            vflan.train(wrong)
        assert not (wrong.folder / "mixture.json").exists()
