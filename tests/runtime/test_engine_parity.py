"""The ordinary parity run through the engine session, on the fake device: the whole path but the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_bundles import bundle_with_engines
from fake_device import FakeDevice

from k25_engines.engine_options import EngineOptions
from k25_plugins.errors import BackendMissingError
from k25_runtime.engine_opening import engine_backend_from_bundle
from k25_validate.bisect import bisect_bundle
from k25_validate.validation import parity_report_from_bundle
from k25_validate.validation_options import ValidationOptions

OPTIONS = EngineOptions(
    precision="fp32", max_sequences=64, max_tokens=512, max_rows=512, block_size=32, context=512, max_patches=4096
)


@pytest.fixture(scope="module")
def bundle(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_engines(tiny.bundle, tmp_path_factory.mktemp("engines"), options=OPTIONS)


def test_a_parity_report_of_engines(bundle: Path) -> None:
    device = FakeDevice()
    backend = engine_backend_from_bundle(bundle, device=device)
    report = parity_report_from_bundle(bundle, backend=backend, options=ValidationOptions(backend="tensorrt"))
    backend.close()
    assert report.passed, report.summary()
    assert report.runtime["backend"] == backend.name
    assert len(report.rows) == 4 + 2 + 1
    device.closed_clean()


def test_without_a_gpu_it_says_which_one_it_needs(bundle: Path) -> None:
    from k25_engines.tensorrt_module import device_compute_capability

    if device_compute_capability() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendMissingError):
        parity_report_from_bundle(bundle, options=ValidationOptions(backend="tensorrt"))


def test_bisect_walks_engines(bundle: Path) -> None:
    device = FakeDevice()
    backend = engine_backend_from_bundle(bundle, device=device)
    report = bisect_bundle(bundle, backend=backend, token_ids=[1, 2, 3])
    backend.close()
    assert report.passed, report.summary()
    assert report.backend == backend.name
    device.closed_clean()
