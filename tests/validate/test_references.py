"""The two references: they agree with each other, and they notice what is wrong with a checkpoint."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest
import torch

from k25_export.demo.checkpoint import write_demo_checkpoint
from k25_plugins.errors import BackendMissingError, VerificationError
from k25_validate.metrics import relative_l2, router_agreement
from k25_validate.plain_reference import PlainReference
from k25_validate.reference import Reference, ReferenceTrace
from k25_validate.transformers_reference import TransformersReference

TOLERANCE = 5e-6
PROMPT, NEW = 31, 9
INDEX = "model.safetensors.index.json"
# Sizes that are no powers of two, one expert a token, no dense layer, no MoE layer.
ODD_SIZES: Mapping[str, Mapping[str, int]] = {
    "odd": {
        "hidden_size": 96,
        "num_hidden_layers": 5,
        "n_routed_experts": 10,
        "num_attention_heads": 5,
        "kv_lora_rank": 40,
        "q_lora_rank": 36,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 6,
        "v_head_dim": 20,
    },
    "one_expert": {"num_experts_per_tok": 1, "n_shared_experts": 2},
    "no_dense_layer": {"first_k_dense_replace": 0, "num_hidden_layers": 2},
    "no_moe_layer": {"first_k_dense_replace": 2, "num_hidden_layers": 2},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references") / "tiny"
    write_demo_checkpoint(folder, preset="tiny")
    return folder


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> PlainReference:
    return PlainReference(checkpoint)


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> TransformersReference:
    return TransformersReference(checkpoint)


@pytest.fixture(scope="module")
def tokens(checkpoint: Path) -> list[int]:
    return some_tokens(checkpoint)


@pytest.fixture(scope="module")
def trace(plain: PlainReference, tokens: list[int]) -> ReferenceTrace:
    return plain.trace(tokens)


@pytest.fixture
def own_copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def some_tokens(checkpoint: Path, count: int = PROMPT + NEW) -> list[int]:
    vocabulary = read(checkpoint / "config.json")["text_config"]["vocab_size"]
    found: list[int] = np.random.default_rng(7).integers(0, vocabulary, count).tolist()
    return found


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = read(path)
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def set_first_bfloat16(checkpoint: Path, name: str, value: float) -> None:
    """Overwrite the first element of a stored bf16 tensor."""
    shard = checkpoint / read(checkpoint / INDEX)["weight_map"][name]
    with shard.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        start = json.loads(file.read(length))[name]["data_offsets"][0]
        file.seek(8 + length + start)
        file.write(struct.pack("<f", value)[2:])


def sorted_by_expert(trace: ReferenceTrace, layer: int) -> npt.NDArray[np.float32]:
    order = trace.expert_ids[layer].argsort(axis=-1)
    return np.take_along_axis(trace.expert_weights[layer], order, axis=-1)


def assert_same_model(actual: ReferenceTrace, expected: ReferenceTrace) -> None:
    assert len(actual.hidden) == len(expected.hidden)
    for state, wanted in zip(actual.hidden, expected.hidden, strict=True):
        assert relative_l2(state, wanted) < TOLERANCE
    assert actual.expert_ids.keys() == expected.expert_ids.keys()
    for layer in expected.expert_ids:
        assert router_agreement(actual.expert_ids[layer], expected.expert_ids[layer]) == 1
        assert relative_l2(sorted_by_expert(actual, layer), sorted_by_expert(expected, layer)) < TOLERANCE
    assert relative_l2(actual.logits, expected.logits) < TOLERANCE


def test_both_references_compute_the_same_model(
    trace: ReferenceTrace, judge: TransformersReference, tokens: list[int]
) -> None:
    assert_same_model(trace, judge.trace(tokens))


@pytest.mark.parametrize("sizes", ODD_SIZES.values(), ids=ODD_SIZES.keys())
def test_they_agree_at_odd_sizes(sizes: Mapping[str, int], tmp_path: Path) -> None:
    write_demo_checkpoint(tmp_path / "odd", preset="tiny", seed=3, overrides=sizes)
    tokens = some_tokens(tmp_path / "odd")
    assert_same_model(
        PlainReference(tmp_path / "odd").trace(tokens), TransformersReference(tmp_path / "odd").trace(tokens)
    )


def test_they_agree_on_a_checkpoint_without_vision(own_copy: Path, trace: ReferenceTrace, tokens: list[int]) -> None:
    edit(own_copy / "config.json", lambda config: config.update(vision_config=None))

    def text_only(index: dict[str, Any]) -> None:
        index["weight_map"] = {
            name: at for name, at in index["weight_map"].items() if name.startswith("language_model.")
        }

    edit(own_copy / INDEX, text_only)
    assert_same_model(TransformersReference(own_copy).trace(tokens), trace)
    assert_same_model(PlainReference(own_copy).trace(tokens), trace)


def test_float32_is_within_rounding_of_float64(checkpoint: Path, trace: ReferenceTrace, tokens: list[int]) -> None:
    exact = PlainReference(checkpoint, dtype=torch.float64).trace(tokens)
    assert_same_model(trace, exact)
    assert relative_l2(trace.logits, exact.logits) > 0


def test_the_rotary_frequencies_are_those_of_the_release(tmp_path: Path) -> None:
    write_demo_checkpoint(tmp_path / "wide", preset="tiny", overrides={"qk_rope_head_dim": 64})
    found = PlainReference(tmp_path / "wide", dtype=torch.float64)._model._inverse_frequencies_P
    assert len(found) == 32
    # Recomputed in double precision from the official rope_scaling; index 8 is the last one left alone.
    known = {0: 1.0, 1: 0.713111085, 8: 6.68740305e-2, 9: 4.37766560e-2, 16: 1.53729673e-3, 20: 1.80702339e-5}
    known |= {19: 1.58374991e-4, 31: 4.38220646e-7}
    for pair, value in known.items():
        assert float(found[pair]) == pytest.approx(value, rel=1e-8)


def test_the_cached_decode_equals_the_full_forward(
    judge: TransformersReference, trace: ReferenceTrace, tokens: list[int]
) -> None:
    steps = judge.decode_logits(tokens[:PROMPT], tokens[PROMPT:])
    assert steps.dtype == np.float32
    full = judge.trace(tokens).logits[PROMPT - 1 : -1]
    assert relative_l2(steps, full) < TOLERANCE
    assert relative_l2(steps, trace.logits[PROMPT - 1 : -1]) < TOLERANCE
    assert relative_l2(judge.decode_logits(tokens[:1], [0]), trace.logits[:1]) < TOLERANCE


def test_they_agree_away_from_position_zero(
    plain: PlainReference, judge: TransformersReference, tokens: list[int]
) -> None:
    shifted = plain.trace(tokens, first_position=500)
    assert_same_model(shifted, judge.trace(tokens, first_position=500))
    # Rotary attention depends on distances only.
    assert 0 < relative_l2(shifted.logits, plain.trace(tokens).logits) < 1e-4


def test_they_agree_on_the_other_latent_norm(checkpoint: Path, trace: ReferenceTrace, tokens: list[int]) -> None:
    other = PlainReference(checkpoint, latent_norm_eps=1e-2).trace(tokens)
    assert_same_model(other, TransformersReference(checkpoint, latent_norm_eps=1e-2).trace(tokens))
    assert relative_l2(other.logits, trace.logits) > 1e-4


def test_the_media_placeholder_is_a_token_like_any_other(
    checkpoint: Path, plain: PlainReference, judge: TransformersReference
) -> None:
    tokens = [read(checkpoint / "config.json")["media_placeholder_token_id"], 4]
    assert_same_model(plain.trace(tokens), judge.trace(tokens))


@pytest.mark.parametrize("kind", ["plain", "transformers"])
def test_a_trace_has_the_promised_shapes(
    kind: str, plain: PlainReference, judge: TransformersReference, checkpoint: Path, tokens: list[int]
) -> None:
    reference: Reference = plain if kind == "plain" else judge
    assert reference.name == kind
    result = reference.trace(tokens)
    text = read(checkpoint / "config.json")["text_config"]
    layers, count = text["num_hidden_layers"], len(tokens)
    assert result.token_ids.tolist() == tokens
    assert result.token_ids.dtype == np.int64
    assert [state.shape for state in result.hidden] == [(count, text["hidden_size"])] * (layers + 1)
    assert result.logits.shape == (count, text["vocab_size"])
    assert {array.dtype for array in (*result.hidden, result.logits)} == {np.dtype(np.float32)}
    assert list(result.expert_ids) == list(result.expert_weights) == list(range(text["first_k_dense_replace"], layers))
    for layer, ids in result.expert_ids.items():
        weights = result.expert_weights[layer]
        assert ids.shape == weights.shape == (count, text["num_experts_per_tok"])
        assert [ids.dtype, weights.dtype] == [np.dtype(np.int64), np.dtype(np.float32)]
        np.testing.assert_allclose(weights.sum(axis=-1), text["routed_scaling_factor"], rtol=1e-6)


def test_one_scale_moves_the_logits_and_an_expert_that_is_not_hit_does_not(
    own_copy: Path, plain: PlainReference, tokens: list[int]
) -> None:
    before = plain.trace(tokens[:2])
    hit = int(before.expert_ids[1][0, 0])
    idle = next(expert for expert in range(99) if expert not in before.expert_ids[1])
    name = "language_model.model.layers.1.mlp.experts.{}.down_proj.weight_scale"
    set_first_bfloat16(own_copy, name.format(idle), 7.0)
    assert relative_l2(PlainReference(own_copy).trace(tokens[:2]).logits, before.logits) == 0
    set_first_bfloat16(own_copy, name.format(hit), 7.0)
    after = PlainReference(own_copy).trace(tokens[:2])
    assert relative_l2(after.logits, before.logits) > 1e-2
    assert_same_model(after, TransformersReference(own_copy).trace(tokens[:2]))


def test_nothing_is_fetched_and_nothing_is_left_behind(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    def refuse(*_arguments: object, **_options: object) -> NoReturn:
        raise AssertionError("a reference used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    TransformersReference(checkpoint).trace([1, 2, 3])
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
    assert capfd.readouterr() == ("", "")


def test_progress_is_reported(checkpoint: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def record(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))

    PlainReference(checkpoint, progress=record).trace([1])
    layers = read(checkpoint / "config.json")["text_config"]["num_hidden_layers"]
    assert [(done, total) for _, done, total in seen] == [(layer, layers) for layer in range(1, layers + 1)]
    seen.clear()
    TransformersReference(checkpoint, progress=record)
    tensors = len(read(checkpoint / INDEX)["weight_map"])
    assert (len(seen), seen[-1][1:]) == (tensors, (tensors, tensors))


@pytest.mark.parametrize(
    "name",
    ["language_model.model.norm.weight", "language_model.model.layers.2.mlp.experts.3.up_proj.weight_packed"],
)
def test_a_missing_tensor_is_named(name: str, own_copy: Path) -> None:
    edit(own_copy / INDEX, lambda index: index["weight_map"].pop(name))
    stem = name.removeprefix("language_model.").removesuffix("_packed").removeprefix("model.")
    with pytest.raises(VerificationError, match=rf"1 missing keys: .*{stem}"):
        TransformersReference(own_copy)
    with pytest.raises(ValueError, match=f"{name}: expected in the weight_map"):
        PlainReference(own_copy).trace(list(range(200)))


@pytest.mark.parametrize("name", ["stranger", "language_model.model.layers.1.mlp.experts.999.up_proj.weight"])
def test_a_tensor_too_many_is_named(name: str, own_copy: Path) -> None:
    def alias(index: dict[str, Any]) -> None:
        index["weight_map"][name] = index["weight_map"]["language_model.model.norm.weight"]

    edit(own_copy / INDEX, alias)
    shard = own_copy / read(own_copy / INDEX)["weight_map"][name]
    from safetensors.torch import load_file, save_file

    save_file(load_file(shard) | {name: torch.zeros(2)}, shard)
    with pytest.raises(VerificationError, match=f"1 unexpected keys: {name}"):
        TransformersReference(own_copy)


def test_a_shape_that_does_not_fit_is_named(own_copy: Path) -> None:
    edit(own_copy / "config.json", lambda config: config["text_config"].update(v_head_dim=32))
    with pytest.raises(VerificationError, match=r"mismatched keys: .*kv_b_proj"):
        TransformersReference(own_copy)


def test_without_transformers_the_install_line_is_given(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendMissingError, match=r'pip install "k25-export\[transformers\]"'):
        TransformersReference(checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_group", 8, "text_config.n_group: expected 1, found 8"),
        ("hidden_act", "gelu", "text_config.hidden_act: expected 'silu', found 'gelu'"),
        ("rope_scaling", {"type": "linear"}, "rope_scaling.type: expected 'yarn', found 'linear'"),
        ("rope_scaling", {"type": "yarn", "factor": 64.0}, "expected original_max_position_embeddings, mscale_all_dim"),
        ("kv_lora_rank", None, "expected kv_lora_rank, found nothing"),
    ],
)
def test_plain_refuses_another_model(key: str, value: object, message: str, own_copy: Path) -> None:
    edit(own_copy / "config.json", lambda config: config["text_config"].update({key: value}))
    with pytest.raises(ValueError, match=message):
        PlainReference(own_copy)


def test_plain_reads_the_spelling_of_transformers_5(own_copy: Path, trace: ReferenceTrace, tokens: list[int]) -> None:
    def respell(config: dict[str, Any]) -> None:
        text = config["text_config"]
        rope = text.pop("rope_scaling")
        text["rope_parameters"] = rope | {"rope_theta": text.pop("rope_theta"), "rope_type": rope.pop("type")}

    edit(own_copy / "config.json", respell)
    for reference in (PlainReference(own_copy), TransformersReference(own_copy)):
        assert_same_model(reference.trace(tokens), trace)


def test_plain_refuses_experts_whose_parts_do_not_fit(own_copy: Path, trace: ReferenceTrace, tokens: list[int]) -> None:
    from safetensors.torch import load_file, save_file

    name = f"language_model.model.layers.1.mlp.experts.{trace.expert_ids[1][0, 0]}.up_proj"
    shard = own_copy / read(own_copy / INDEX)["weight_map"][name + ".weight_shape"]
    tensors = load_file(shard)
    tensors[name + ".weight_shape"] += 1
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=f"{name}: expected packed codes, scales and weight_shape of one matrix"):
        PlainReference(own_copy).trace(tokens)


def test_a_shard_outside_the_folder_is_refused(own_copy: Path) -> None:
    name = "language_model.model.embed_tokens.weight"
    edit(own_copy / INDEX, lambda index: index["weight_map"].update({name: "../elsewhere.safetensors"}))
    with pytest.raises(ValueError, match="expected a plain file name as its shard"):
        PlainReference(own_copy).trace([1])


def test_odd_arguments_are_refused(checkpoint: Path, plain: PlainReference, judge: TransformersReference) -> None:
    with pytest.raises(ValueError, match=r"dtype: expected torch\.float32 or torch\.float64"):
        PlainReference(checkpoint, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="new_ids: expected at least one token"):
        judge.decode_logits([1], [])
    for reference in (plain, judge):
        for tokens in ([], [-1], [10**6]):
            with pytest.raises(ValueError, match="token_ids: expected"):
                reference.trace(tokens)
        with pytest.raises(ValueError, match="first_position: expected 0 or more"):
            reference.trace([1], first_position=-1)
