"""`--save-logits`: what is in the file, and that it is there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from k25_plugins.errors import InputError
from k25_runtime import Runtime
from k25_runtime.logits_file import save_logits

VOCABULARY = 7


def values(prompt: int = 3, new: int = 2) -> dict[str, npt.NDArray[Any]]:
    generator = np.random.default_rng(prompt)
    return {
        "token_ids": generator.integers(0, VOCABULARY, prompt + new, dtype=np.int64),
        "prompt_logits": generator.standard_normal((prompt, VOCABULARY), np.float32),
        "step_logits": generator.standard_normal((new, VOCABULARY), np.float32),
    }


@pytest.mark.parametrize("new", [0, 2])
def test_the_file_holds_three_arrays_as_they_were(tmp_path: Path, new: int) -> None:
    written = values(new=new)
    save_logits(tmp_path / "logits.npz", **written)
    with np.load(tmp_path / "logits.npz", allow_pickle=False) as found:
        assert set(found.files) == {"token_ids", "prompt_logits", "step_logits"}
        for name, array in written.items():
            assert found[name].dtype == array.dtype
            assert np.array_equal(found[name], array)
        assert found["step_logits"].shape == (new, VOCABULARY)
    assert os.listdir(tmp_path) == ["logits.npz"]  # noqa: PTH208


def test_a_generation_can_be_compared_from_outside(tmp_path: Path, exported: Any) -> None:
    """token_ids [P + N], prompt_logits [P, V], step_logits [N, V]; row i is what the i-th new token was chosen from."""
    prompt, new = [3, 1, 4, 1, 5], 4
    with Runtime.open(exported.bundle, context=32, threads=1) as runtime:
        vocabulary = runtime.manifest.model.text.vocab_size
        result = runtime.generate(token_ids=prompt, max_new_tokens=new, ignore_eos=True, keep_logits=True)
    assert result.prompt_logits is not None
    assert result.step_logits is not None
    save_logits(
        tmp_path / "logits.npz",
        token_ids=np.array([*result.prompt_ids, *result.new_ids], np.int64),
        prompt_logits=result.prompt_logits,
        step_logits=result.step_logits,
    )
    with np.load(tmp_path / "logits.npz", allow_pickle=False) as found:
        assert {name: (found[name].dtype, found[name].shape) for name in found.files} == {
            "token_ids": (np.int64, (len(prompt) + new,)),
            "prompt_logits": (np.float32, (len(prompt), vocabulary)),
            "step_logits": (np.float32, (new, vocabulary)),
        }
        assert found["token_ids"][: len(prompt)].tolist() == prompt
        assert np.array_equal(found["step_logits"].argmax(axis=-1), found["token_ids"][len(prompt) :])
        assert np.array_equal(found["step_logits"][0], found["prompt_logits"][-1])


def test_folders_are_made_and_the_name_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "no-suffix"
    save_logits(path, **values())
    assert [entry.name for entry in path.parent.iterdir()] == ["no-suffix"]
    with np.load(path) as found:
        assert len(found.files) == 3


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "logits.npz"
    save_logits(path, **values(prompt=3))
    save_logits(path, **values(prompt=5))
    with np.load(path) as found:
        assert len(found["prompt_logits"]) == 5


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "logits.npz"
    save_logits(path, **values())
    before = path.read_bytes()

    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", half)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_logits(path, **values(prompt=6))
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)
        assert "No space left" in str(caught.value)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["logits.npz"]


def test_a_folder_under_the_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "logits.npz").mkdir()
    with pytest.raises(InputError, match=r"logits\.npz: cannot be written"):
        save_logits(tmp_path / "logits.npz", **values())
    assert [entry.name for entry in tmp_path.iterdir()] == ["logits.npz"]


def test_a_file_where_a_folder_is_needed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"logits\.npz: cannot be written"):
        save_logits(tmp_path / "file" / "logits.npz", **values())


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        save_logits(tmp_path / ("x" * 300), **values())
