"""Where a checkpoint is: a folder, or a Hugging Face id in the local cache. No path leads out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from k25_export.checkpoint_files import file_in_checkpoint, folder_of_checkpoint
from k25_plugins.errors import InputError

COMMIT = "54383e83fa343a1331754112fb9e3410c55efa2f"
OTHER = "2426b45b6af0da48d0dcce71bbce6225e5c73adc"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache with one model in two revisions, laid out as huggingface_hub does: links into blobs."""
    cache = tmp_path / "hub"
    model = cache / "models--moonshotai--Kimi-K2.5"
    (model / "blobs").mkdir(parents=True)
    for commit in (COMMIT, OTHER):
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "blobs" / f"blob-{commit}").write_text(commit)
        (model / "snapshots" / commit / "config.json").symlink_to(f"../../blobs/blob-{commit}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    (model / "refs" / "v1.0").write_text(f"{OTHER}\n")
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return cache


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    assert folder_of_checkpoint(tmp_path / "checkpoint") == (tmp_path / "checkpoint").resolve()
    assert folder_of_checkpoint(str(tmp_path / "checkpoint")).is_absolute()
    monkeypatch.chdir(tmp_path)
    assert folder_of_checkpoint("checkpoint") == (tmp_path / "checkpoint").resolve()


def test_a_folder_wins_over_an_id(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "moonshotai" / "Kimi-K2.5").mkdir(parents=True)
    assert folder_of_checkpoint("moonshotai/Kimi-K2.5") == (tmp_path / "moonshotai" / "Kimi-K2.5").resolve()


@pytest.mark.parametrize(
    ("location", "commit"),
    [
        ("moonshotai/Kimi-K2.5", COMMIT),
        ("moonshotai/Kimi-K2.5@main", COMMIT),
        ("moonshotai/Kimi-K2.5@v1.0", OTHER),
        (f"moonshotai/Kimi-K2.5@{OTHER}", OTHER),
    ],
)
def test_an_id_is_found_in_the_cache(hub: Path, location: str, commit: str) -> None:
    folder = folder_of_checkpoint(location)
    assert folder == (hub / "models--moonshotai--Kimi-K2.5" / "snapshots" / commit).resolve()
    assert file_in_checkpoint(folder, "config.json").read_text() == commit


@pytest.mark.parametrize(
    ("variable", "value", "cache"),
    [
        ("HF_HUB_CACHE", "elsewhere", "elsewhere"),
        ("HF_HOME", "face", "face/hub"),
        ("XDG_CACHE_HOME", "xdg", "xdg/huggingface/hub"),
        ("HOME", "home2", "home2/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_hugging_face_puts_it(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, cache: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / value))
    (tmp_path / cache).parent.mkdir(parents=True, exist_ok=True)
    hub.rename(tmp_path / cache)
    assert folder_of_checkpoint("moonshotai/Kimi-K2.5").is_relative_to((tmp_path / cache).resolve())


@pytest.mark.parametrize(
    "location",
    ["moonshotai/Kimi-K2", "other/Kimi-K2.5", "moonshotai/Kimi-K2.5@v2", "../hub", "moonshotai/..", "x/y@.."],
)
def test_an_id_that_is_not_in_the_cache_is_refused(hub: Path, location: str) -> None:
    with pytest.raises(InputError) as caught:
        folder_of_checkpoint(location)
    assert location in str(caught.value)


@pytest.mark.parametrize("revision", ["..", "../../..", "../blobs", f"../snapshots/{COMMIT}"])
def test_a_revision_does_not_lead_out_of_the_snapshots(hub: Path, revision: str) -> None:
    with pytest.raises(InputError, match=r"Kimi-K2\.5@"):
        folder_of_checkpoint(f"moonshotai/Kimi-K2.5@{revision}")


def test_nothing_is_downloaded_and_the_message_says_so(hub: Path) -> None:
    with pytest.raises(InputError, match=r"moonshotai/Kimi-K2-Base.*downloads nothing"):
        folder_of_checkpoint("moonshotai/Kimi-K2-Base")


@pytest.mark.parametrize(
    "location",
    ["nowhere", "/no/such/folder", "a/b/c", "x" * 300, "owner/" + "x" * 300],
    ids=["name", "absolute", "path", "long name", "long id"],
)
def test_no_such_folder_is_refused(hub: Path, location: str) -> None:
    with pytest.raises(InputError, match="checkpoint"):
        folder_of_checkpoint(location)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"expected a folder, found a file"):
        folder_of_checkpoint(tmp_path / "model.safetensors")


def test_a_file_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    assert file_in_checkpoint(tmp_path, "a") == (tmp_path / "a").resolve()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file shard-1.*download complete"):
        file_in_checkpoint(tmp_path, "shard-1")


@pytest.mark.parametrize("target", ["../outside", "/etc/hostname"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "outside").write_text("secret")
    (folder / "a").symlink_to(target)
    with pytest.raises(InputError, match=r"a leads out of"):
        file_in_checkpoint(folder, "a")


def test_a_link_through_a_linked_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("secret")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of"):
        file_in_checkpoint(folder, "sub/a")


def test_a_neighbour_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "a").write_text("secret")
    (folder / "a").symlink_to("../checkpoint-2/a")
    with pytest.raises(InputError, match="leads out of"):
        file_in_checkpoint(folder, "a")


@pytest.mark.parametrize("target", ["a", "missing"])
def test_loops_and_dangling_links_are_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "a").symlink_to(target)
    with pytest.raises(InputError, match="no file a"):
        file_in_checkpoint(tmp_path, "a")


def test_blobs_of_the_same_repository_are_inside(hub: Path) -> None:
    folder = folder_of_checkpoint("moonshotai/Kimi-K2.5")
    assert file_in_checkpoint(folder, "config.json").parent.name == "blobs"
    # Given as a folder, the snapshot is as good as its id.
    assert file_in_checkpoint(folder_of_checkpoint(str(folder)), "config.json").read_text() == COMMIT


def test_blobs_of_another_repository_are_outside(hub: Path) -> None:
    (hub / "models--other--model" / "blobs").mkdir(parents=True)
    (hub / "models--other--model" / "blobs" / "secret").write_text("secret")
    folder = folder_of_checkpoint("moonshotai/Kimi-K2.5")
    (folder / "a").symlink_to("../../../models--other--model/blobs/secret")
    with pytest.raises(InputError, match="leads out of"):
        file_in_checkpoint(folder, "a")


def test_a_folder_named_snapshots_alone_opens_nothing(tmp_path: Path) -> None:
    # Only a cache layout (blobs beside snapshots) widens what is inside.
    folder = tmp_path / "snapshots" / "x"
    folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (folder / "a").symlink_to("../../secret")
    with pytest.raises(InputError, match="leads out of"):
        file_in_checkpoint(folder, "a")
