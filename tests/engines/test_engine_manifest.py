"""engines.json: read back as written; everything that is not as the format says is refused by name."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k25_engines.manifest import (
    EngineEntry,
    EngineManifest,
    PluginBuild,
    Profile,
    engine_manifest_from_json,
    engine_manifest_to_json,
    engine_path,
    log_path,
    read_engine_file,
    read_engine_manifest,
    with_file,
)
from k25_export.manifest import Port
from k25_plugins.errors import InputError

CONTENT = b"an engine"


def entry(component: str = "moe_layer", target: str = "sm120", **changes: Any) -> EngineEntry:
    ports = {
        "hidden": Port(name="hidden", dtype="bfloat16", shape=("tokens", 64)),
        "cache": Port(name="cache", dtype="bfloat16", shape=("blocks", "block_size", 40)),
        "weight": Port(name="weight", dtype="bfloat16", shape=(64,)),
    }
    values: dict[str, Any] = {
        "component": component,
        "target": target,
        "compute_capabilities": ("12.0",),
        "path": engine_path(component, target),
        "bytes": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "precision": "bf16",
        "portable": False,
        "flavour": "tensorrt-rtx",
        "version": "1.7.1.116",
        "inputs": tuple(ports.values()),
        "outputs": (
            Port(name="hidden_out", dtype="bfloat16", shape=("tokens", 64)),
            Port(name="cache_out", dtype="bfloat16", shape=("blocks", "block_size", 40)),
        ),
        "aliases": {"cache_out": "cache"},
        "profiles": tuple(
            Profile(
                name=name,
                shapes={
                    "hidden": ((1, 64), (largest, 64), (largest, 64)),
                    "cache": ((1, 16, 40), (9, 16, 40), (9, 16, 40)),
                },
            )
            for name, largest in (("decode", 8), ("prefill", 99))
        ),
        "plugins": PluginBuild(namespace="k25", version="1", source_sha256="1" * 64, layers={"MLA": 1}),
        "component_sha256": {component: "2" * 64},
        "key": "3" * 64,
        "build_seconds": 0.25,
        "peak_memory_bytes": 1 << 28,
        "checks": {"parser": "accepted"},
        "warnings": ("a warning",),
        "log": log_path(component, target),
    }
    return EngineEntry(**(values | changes))


def test_what_is_written_is_read_back() -> None:
    decoder = entry("decoder", "sm80", layers=(0, 1), compute_capabilities=("8.0",))
    portable = entry("dense_layer", portable=True, aliases={}, plugins=None)
    manifest = EngineManifest(engines=(decoder, portable, entry()))
    text = engine_manifest_to_json(manifest)
    assert engine_manifest_from_json(text) == manifest
    assert engine_manifest_to_json(engine_manifest_from_json(text)) == text
    assert json.loads(text)["format"] == "k25-engines"


def test_an_engine_is_found_by_component_and_target() -> None:
    manifest = EngineManifest(engines=(entry(), entry("head", "sm80", compute_capabilities=("8.0",), aliases={})))
    assert manifest.engine("head", "sm80").component == "head"
    assert manifest.find("head", "sm120") is None
    assert manifest.targets() == ("sm120", "sm80")
    assert manifest.targets("8.0") == ("sm80",)
    assert manifest.targets("9.0") == ()
    with pytest.raises(InputError, match=r"expected head for sm86.*found moe_layer for sm120.*compile BUNDLE --target"):
        manifest.engine("head", "sm86")


def test_profiles_are_found_by_name() -> None:
    assert [entry().profile_index(name) for name in ("decode", "prefill")] == [0, 1]
    with pytest.raises(InputError, match=r"moe_layer for sm120: profiles: expected decode"):
        entry(profiles=()).profile_index("decode")


def test_merging_replaces_the_same_and_keeps_the_others_in_order() -> None:
    first = EngineManifest().merged((entry("head", "sm120"), entry("embed", "sm80")))
    again = first.merged((entry("head", "sm120", version="1.8.0"), entry("head", "sm86")))
    assert [(item.component, item.target, item.version) for item in again.engines] == [
        ("embed", "sm80", "1.7.1.116"),
        ("head", "sm86", "1.7.1.116"),
        ("head", "sm120", "1.8.0"),
    ]
    assert again.without({("head", "sm120")}).engines == again.engines[:2]


def _set(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        place: Any = values["engines"][0]
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "format": (lambda v: v.update(format="k25-bundle"), "format"),
    "a newer version": (lambda v: v.update(schema_version=2), "schema_version"),
    "version true": (lambda v: v.update(schema_version=True), "schema_version"),
    "an unknown key": (lambda v: v.update(extra=1), "extra"),
    "an unknown key of an engine": (_set("extra", value=1), "extra"),
    "engines no list": (lambda v: v.update(engines={}), "a list"),
    "an engine twice": (lambda v: v["engines"].append(copy.deepcopy(v["engines"][0])), "twice"),
    "path outside": (_set("path", value="../../etc/passwd"), "path"),
    "path of another": (_set("path", value="engines/sm120/head.engine"), "path"),
    "log outside": (_set("log", value="/tmp/log"), "log"),
    "component with a slash": (_set("component", value="../x"), "component"),
    "component empty": (_set("component", value=""), "component"),
    "target with a slash": (_set("target", value="sm1/0"), "target"),
    "target in other digits": (_set("target", value="sm\u0967\u0968\u0966"), "target"),
    "no compute capability": (_set("compute_capabilities", value=[]), "compute_capabilities"),
    "a strange compute capability": (_set("compute_capabilities", value=["12"]), "compute_capabilities"),
    "sha256 of another length": (_set("sha256", value="0" * 63), "sha256"),
    "key in capitals": (_set("key", value="A" * 64), "key"),
    "hash of a component": (_set("component_sha256", value={"moe_layer": "x"}), "moe_layer"),
    "no bytes": (_set("bytes", value=0), "not negative"),
    "bytes a float": (_set("bytes", value=1.5), "bytes"),
    "negative memory": (_set("peak_memory_bytes", value=-1), "not negative"),
    "seconds a text": (_set("build_seconds", value="1"), "build_seconds"),
    "an unknown precision": (_set("precision", value="fp16"), "precision"),
    "an unknown flavour": (_set("flavour", value="tensorrt-lite"), "flavour"),
    "portable with plugins": (_set("portable", value=True), "portable"),
    "alias of nothing": (_set("aliases", value={"cache_out": "kv"}), "aliases"),
    "alias of another shape": (_set("aliases", value={"hidden_out": "cache"}), "aliases"),
    "an input twice": (lambda v: v["engines"][0]["inputs"].append(v["engines"][0]["inputs"][0]), "twice"),
    "an unknown profile": (_set("profiles", 0, "name", value="warmup"), "name"),
    "a profile without an input": (lambda v: v["engines"][0]["profiles"][1]["shapes"].pop("cache"), "cache"),
    "a profile of a weight": (_set("profiles", 0, "shapes", "weight", value=[[64], [64], [64]]), "weight"),
    "min over max": (_set("profiles", 0, "shapes", "hidden", value=[[9, 64], [8, 64], [8, 64]]), "min <= opt <= max"),
    "another fixed axis": (_set("profiles", 0, "shapes", "hidden", value=[[1, 65], [8, 65], [8, 65]]), "hidden"),
    "an axis too few": (_set("profiles", 0, "shapes", "hidden", value=[[1], [8], [8]]), "2 axes"),
    "axes of two ranks": (_set("profiles", 0, "shapes", "hidden", value=[[1, 64], [8], [8, 64]]), "2 axes"),
    "two shapes": (_set("profiles", 0, "shapes", "hidden", value=[[1, 64], [8, 64]]), "3 items"),
    "negative sizes": (_set("profiles", 0, "shapes", "hidden", value=[[-1, 64], [8, 64], [8, 64]]), "hidden"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_are_refused(name: str) -> None:
    change, named = HOSTILE[name]
    values = json.loads(engine_manifest_to_json(EngineManifest(engines=(entry(),))))
    change(values)
    with pytest.raises(InputError, match=r"^engines/engines\.json") as caught:
        engine_manifest_from_json(json.dumps(values))
    assert named in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b'{"format": "\xff"}', b"[" * 100_000, b"{"])
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(InputError, match=r"^engines/engines\.json"):
        engine_manifest_from_json(text)


def test_a_bundle_without_engines_has_none(tmp_path: Path) -> None:
    assert read_engine_manifest(tmp_path) == EngineManifest()
    (tmp_path / "engines" / "engines.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot read engines/engines\.json"):
        read_engine_manifest(tmp_path)


def test_an_engine_is_read_only_where_it_is_the_one_that_was_built(tmp_path: Path) -> None:
    built = entry()
    with pytest.raises(InputError, match=r"moe_layer for sm120.*No such file.*k25-export compile"):
        read_engine_file(tmp_path, built)
    place = tmp_path / built.path
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert read_engine_file(tmp_path, built) == CONTENT
    place.write_bytes(CONTENT[:-1])
    with pytest.raises(InputError, match=r"sm120: engines/sm120/moe_layer\.engine: expected 9 bytes, found 8"):
        read_engine_file(tmp_path, built)
    place.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(InputError, match=r"SHA-256: expected .*, found .*compile"):
        read_engine_file(tmp_path, built)
    assert with_file(built, place.read_bytes()).sha256 == hashlib.sha256(place.read_bytes()).hexdigest()
