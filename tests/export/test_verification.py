"""`verify`: what changed since the export, by sizes, headers and hashes; interrupted and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from k25_cli.main import run
from k25_export.manifest import Manifest, TensorGroup, read_manifest
from k25_export.shard_digests import JOURNAL_NAME
from k25_export.tensor_hashes import HASHES_NAME
from k25_export.verification import Verification, record_hashes, verification_of_bundle
from k25_plugins.errors import InputError
from k25_runtime import Runtime


@dataclass(frozen=True)
class Place:
    bundle: Path
    checkpoint: Path

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.bundle)

    def verify(self, *, is_deep: bool, progress: Callable[[str, int, int], None] | None = None) -> Verification:
        report = progress or (lambda what, done, total: None)
        return verification_of_bundle(self.bundle, self.manifest, self.checkpoint, is_deep=is_deep, progress=report)

    def record(self) -> int:
        return record_hashes(self.bundle, self.manifest, self.checkpoint, progress=lambda what, done, total: None)

    def group(self, suffix: str) -> TensorGroup:
        return next(group for group in self.manifest.tensors if group.name.endswith(suffix))

    def flip(self, offset: int, shard: int) -> str:
        """Flip a bit of a byte of a shard; returns the shard's name."""
        file = self.manifest.shards[shard].file
        with (self.checkpoint / file).open("r+b") as stream:
            stream.seek(offset)
            byte = stream.read(1)[0]
            stream.seek(offset)
            stream.write(bytes([byte ^ 4]))
        return file


@pytest.fixture
def place(odd: Any, tmp_path: Path) -> Place:
    shutil.copytree(odd.bundle, tmp_path / "bundle")
    shutil.copytree(odd.checkpoint, tmp_path / "checkpoint")
    return Place(bundle=tmp_path / "bundle", checkpoint=tmp_path / "checkpoint")


def test_recorded_hashes_are_those_of_the_bytes(place: Place) -> None:
    assert place.record() == sum(1 for group in place.manifest.tensors for _ in group.members())
    hashes = json.loads((place.bundle / HASHES_NAME).read_text())["groups"]
    for group, digests in zip(place.manifest.tensors, hashes, strict=True):
        data = (place.checkpoint / place.manifest.shards[group.shard].file).read_bytes()
        for tensor, digest in zip(group.members(), digests, strict=True):
            assert hashlib.sha256(data[tensor.offset : tensor.offset + tensor.length]).hexdigest() == digest
    found = place.verify(is_deep=True)
    assert found.problems == ()
    assert found.baseline == "hashes.json"
    assert not (place.bundle / JOURNAL_NAME).exists()


def test_one_flipped_byte_is_named_by_shard_and_tensor(place: Place) -> None:
    place.record()
    group = place.group("up_proj.weight_scale")
    assert group.offsets is not None
    file = place.flip(group.offsets[3] + 1, group.shard)
    assert place.verify(is_deep=False).problems == ()  # sizes and headers are as they were
    (problem,) = place.verify(is_deep=True).problems
    assert file in problem
    assert group.name.replace("{expert}", "3") in problem
    Runtime.open(place.bundle, checkpoint=place.checkpoint).close()  # and loading does not see it either


def _truncate(place: Place) -> str:
    file = place.manifest.shards[1].file
    os.truncate(place.checkpoint / file, place.manifest.shards[1].bytes - 1)
    return file


def _alter_header(place: Place) -> str:
    return place.flip(20, 2)


def _other_shard_of_the_same_size(place: Place) -> str:
    first, second = (shard.file for shard in place.manifest.shards[2:4])
    assert (place.checkpoint / first).stat().st_size == (place.checkpoint / second).stat().st_size
    shutil.copy(place.checkpoint / second, place.checkpoint / first)
    return first


def _missing(place: Place) -> str:
    (place.checkpoint / place.manifest.shards[0].file).unlink()
    return place.manifest.shards[0].file


def _link_out(place: Place) -> str:
    file = place.manifest.shards[0].file
    (place.checkpoint / file).rename(place.bundle.parent / "outside")
    (place.checkpoint / file).symlink_to(place.bundle.parent / "outside")
    return file


@pytest.mark.parametrize("damage", [_truncate, _alter_header, _other_shard_of_the_same_size, _missing, _link_out])
def test_a_changed_checkpoint_is_refused_at_load_and_reported(
    place: Place, damage: Callable[[Place], str], capfd: pytest.CaptureFixture[str]
) -> None:
    file = damage(place)
    with pytest.raises(InputError, match=file):
        Runtime.open(place.bundle, checkpoint=place.checkpoint)
    arguments = [str(place.bundle), "--checkpoint", str(place.checkpoint), "-q"]
    assert run(["run", *arguments, "--token-ids", "1"]) == 3
    capfd.readouterr()
    assert run(["verify", *arguments]) == 1
    assert file in capfd.readouterr().out
    with pytest.raises(InputError):
        place.record()


def test_without_a_baseline_a_deep_check_says_so(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(place.bundle), "--checkpoint", str(place.checkpoint), "-q"]
    assert run(arguments) == 0
    assert run([*arguments, "--deep"]) == 1
    assert "no baseline" in capfd.readouterr().out


def test_damaged_files_of_the_bundle_are_reported(place: Place) -> None:
    component = place.bundle / place.manifest.components[0].files[0].path
    component.write_bytes(component.read_bytes() + b" ")
    manifest = place.bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"norm_topk_prob": true', '"norm_topk_prob": false'))
    problems = "\n".join(place.verify(is_deep=False).problems)
    assert component.name in problems
    assert "content_sha256" in problems


def test_hashes_of_another_export_are_refused(place: Place) -> None:
    place.record()
    path = place.bundle / HASHES_NAME
    path.write_text(path.read_text().replace(place.manifest.inputs_sha256, "0" * 64))
    with pytest.raises(InputError, match="those of another export"):
        place.verify(is_deep=True)


def test_an_interrupted_check_goes_on_where_it_was(place: Place) -> None:
    place.record()
    total = sum(shard.bytes for shard in place.manifest.shards)

    class Stop(BaseException):
        pass

    finished = 0

    def interrupt(what: str, done: int, whole: int) -> None:
        nonlocal finished
        if (place.bundle / JOURNAL_NAME).exists():
            finished = len(json.loads((place.bundle / JOURNAL_NAME).read_text())["shards"])
            if finished >= 2:
                raise Stop

    with pytest.raises(Stop):
        place.verify(is_deep=True, progress=interrupt)
    assert finished >= 2
    assert total > 0
    # What the journal holds is not read again: a damage there is seen only by a fresh run.
    known = json.loads((place.bundle / JOURNAL_NAME).read_text())["shards"]
    (place.bundle / JOURNAL_NAME).write_text(
        json.dumps(
            {
                "inputs_sha256": place.manifest.inputs_sha256,
                "shards": {
                    file: {**record, "tensors": ["f" * 64 for _ in record["tensors"]]} for file, record in known.items()
                },
            }
        )
    )
    problems = place.verify(is_deep=True).problems
    assert {problem.split(":")[0] for problem in problems} == {f"shard {file}" for file in known}
    assert not (place.bundle / JOURNAL_NAME).exists()
    assert place.verify(is_deep=True).problems == ()


def test_a_journal_of_a_shard_that_changed_does_not_count(place: Place) -> None:
    place.record()
    file = place.manifest.shards[0].file
    record = {"stamp": [1, 2], "file": None, "tensors": []}
    journal = {"inputs_sha256": place.manifest.inputs_sha256, "shards": {file: record}}
    (place.bundle / JOURNAL_NAME).write_text(json.dumps(journal))
    assert place.verify(is_deep=True).problems == ()


def test_a_hugging_face_cache_brings_its_own_baseline(odd: Any, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in odd.checkpoint.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    shutil.copytree(odd.bundle, tmp_path / "bundle")
    place = Place(bundle=tmp_path / "bundle", checkpoint=snapshot)
    found = place.verify(is_deep=True)
    assert found.problems == ()
    assert found.baseline is not None
    assert "Hugging Face" in found.baseline
    file = place.flip(place.manifest.shards[0].bytes - 1, 0)
    (problem,) = place.verify(is_deep=True).problems
    assert file in problem


def test_export_can_record_at_once(odd: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(odd.bundle, tmp_path / "bundle")
    assert run(["export", str(odd.checkpoint), "--output", str(tmp_path / "bundle"), "--hash", "-q"]) == 0
    assert run(["verify", str(tmp_path / "bundle"), "--deep", "-q"]) == 0
    assert "verified: yes" in capfd.readouterr().out
