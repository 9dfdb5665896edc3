"""`run --image` and `--video`: order, templates, saved logits, and files that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from k25_cli.main import run

TOLERANCE = 2e-5
SCRIPT = Path(__file__).parents[2] / "scripts" / "draw_demo_image.py"

Json = dict[str, Any]


@pytest.fixture(autouse=True)
def _only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("K25_CHECKPOINT", raising=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Pictures of 1, 2 and 6 tokens."""
    paths = []
    for number, size in enumerate([(28, 28), (56, 28), (84, 56)]):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Six frames of one token each."""
    folder = tmp_path / "video"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (28, 28), (40 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


def generated(capfd: pytest.CaptureFixture[str], bundle: Path, *options: object) -> Json:
    """The JSON of a run that works."""
    assert run(["run", str(bundle), "--json", *map(str, options)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    values: Json = json.loads(out)
    return values


def media_runs(ids: list[int], pad: int) -> list[int]:
    """How many placeholders stand in a row, run by run."""
    text = "".join("x" if token == pad else " " for token in ids)
    return [len(run_of_pads) for run_of_pads in text.split()]


def placeholder(bundle: Path) -> int:
    pad: int = json.loads((bundle / "manifest.json").read_bytes())["model"]["media_placeholder_token_id"]
    return pad


def relative_l2(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    difference = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def test_images_and_videos_keep_their_order(
    capfd: pytest.CaptureFixture[str], tiny: Any, pictures: list[Path], video: Path
) -> None:
    one, two, six = pictures
    pad = placeholder(tiny.bundle)
    options = ["--prompt", "Hi", "--max-new-tokens", "0"]
    first = ["--image", six, "--video", video, "--image", two, "--image", one]
    second = ["--image", two, "--image", one, "--image", six, "--video", video]
    assert media_runs(generated(capfd, tiny.bundle, *options, *first)["prompt_ids"], pad) == [6, 1, 1, 2, 1]
    assert media_runs(generated(capfd, tiny.bundle, *second, *options)["prompt_ids"], pad) == [2, 1, 6, 1, 1]
    at_eight = ["--video", video, "--fps", "8", "--image", two]
    assert media_runs(generated(capfd, tiny.bundle, *options, *at_eight)["prompt_ids"], pad) == [1, 2]


def test_the_answer_depends_on_the_image(
    capfd: pytest.CaptureFixture[str], tiny: Any, tmp_path: Path, pictures: list[Path]
) -> None:
    logits = []
    for number, image in enumerate([pictures[0], pictures[0], tmp_path / "other.png"]):
        Image.new("RGB", (28, 28), "white").save(tmp_path / "other.png")
        path = tmp_path / f"{number}.npz"
        generated(capfd, tiny.bundle, "--prompt", "Hi", "--image", image, "--max-new-tokens", 1, "--save-logits", path)
        logits.append(np.load(path)["step_logits"])
    assert np.array_equal(logits[0], logits[1])
    assert relative_l2(logits[2], logits[0]) > 100 * TOLERANCE


def test_saved_logits_with_images_are_those_of_the_plain_reference(
    capfd: pytest.CaptureFixture[str], tiny: Any, tmp_path: Path, pictures: list[Path]
) -> None:
    from k25_runtime.media_processor import MediaProcessor
    from k25_validate.plain_reference import PlainReference
    from k25_validate.reference import MediaInput

    pad, path = placeholder(tiny.bundle), tmp_path / "logits.npz"
    given = f"3 1 {pad} 4 {pad} 5"
    values = generated(
        capfd,
        tiny.bundle,
        *("--token-ids", given, "--image", pictures[2], "--image", pictures[1]),
        *("--max-new-tokens", 3, "--ignore-eos", "--save-logits", path),
    )
    expanded = [3, 1, *[pad] * 6, 4, *[pad] * 2, 5]
    assert values["prompt_ids"] == expanded
    with np.load(path, allow_pickle=False) as saved:
        ids, prompt_logits, step_logits = saved["token_ids"], saved["prompt_logits"], saved["step_logits"]
    assert ids.tolist() == expanded + values["new_ids"]
    items = [MediaProcessor().image(pictures[number]) for number in (2, 1)]
    media = [
        MediaInput(pixel_values=item.pixel_values, grid=item.grid, first_token=first)
        for item, first in zip(items, (2, 9), strict=True)
    ]
    expected = PlainReference(tiny.checkpoint).trace(ids.tolist(), media=media).logits
    assert relative_l2(prompt_logits, expected[: len(expanded)]) < TOLERANCE
    assert relative_l2(step_logits, expected[len(expanded) - 1 : -1]) < TOLERANCE


def test_a_raw_prompt_spells_its_placeholders(
    capfd: pytest.CaptureFixture[str], tiny: Any, pictures: list[Path]
) -> None:
    options = ["--raw", "--image", pictures[1], "--max-new-tokens", 1]
    ids = generated(capfd, tiny.bundle, "--prompt", "a <|media_pad|> b", *options)["prompt_ids"]
    assert media_runs(ids, placeholder(tiny.bundle)) == [2]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--image", "missing.png"], 3, "missing.png: cannot be read"),
        (["--image", "."], 3, "found a folder"),
        (["--video", "missing"], 3, "missing: cannot be read"),
        (["--image", "https://example.com/a.png"], 3, "Nothing is downloaded"),
        (["--fps", "3"], 2, "--video"),
        (["--image"], 2, "--image"),
    ],
)
def test_what_is_refused(
    capfd: pytest.CaptureFixture[str], tiny: Any, options: list[str], code: int, said: str
) -> None:
    assert run(["run", str(tiny.bundle), "--prompt", "Hi", *options]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err


def test_a_damaged_image_and_a_wrong_number_of_them(
    capfd: pytest.CaptureFixture[str], tiny: Any, tmp_path: Path, pictures: list[Path]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(pictures[2].read_bytes()[:-200])
    for options, said in (
        (["--prompt", "Hi", "--image", str(broken)], "broken.jpg: cannot be decoded"),
        (["--token-ids", "1 2", "--image", str(pictures[0])], "expected 1 placeholders"),
        (["--prompt", "Hi", "--image", str(pictures[2]), "--context", "20"], "raise the context"),
    ):
        assert run(["run", str(tiny.bundle), *options]) == 3
        out, err = capfd.readouterr()
        assert out == ""
        assert said in err
        assert err.count("\n") == 1


def test_the_picture_of_the_demo(capfd: pytest.CaptureFixture[str], tiny: Any, tmp_path: Path) -> None:
    paths = [tmp_path / "missing" / "one.png", tmp_path / "two.png"]
    for path in paths:
        subprocess.run([sys.executable, str(SCRIPT), str(path)], check=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    values = generated(capfd, tiny.bundle, "--prompt", "What is this?", "--image", paths[0], "--max-new-tokens", 1)
    assert media_runs(values["prompt_ids"], placeholder(tiny.bundle)) == [108]
