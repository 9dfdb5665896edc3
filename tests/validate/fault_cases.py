"""Builds that are wrong in ways that really happen: how each is made, and where it has to be found.

A fault changes a copy of a bundle (graph or manifest), the runtime's view of the checkpoint, or the runtime itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_edits import (
    Build,
    beta_fast_of_one,
    bfloat16_linear,
    bfloat16_router,
    bfloat16_sum_of_experts,
    bind,
    blocks_of_the_neighbour,
    body,
    build_from,
    change_batches,
    change_vision_inputs,
    damage_scale,
    drop_the_shared_expert,
    exact_gelu,
    exchange_kv_b,
    exchange_rows_and_columns,
    flip_a_bit,
    function,
    graph,
    ignore_the_bias,
    lose_the_normalisation,
    lose_the_offset,
    lose_the_scaling_factor,
    manifest,
    merge_down_first,
    misplace_a_block,
    mscale,
    nan_first,
    no_yarn,
    norm_weight_plus_one,
    of_first_layer,
    other_kernel,
    positions_one_late,
    residual_after_norm,
    reverse_nibbles,
    roll_scales,
    rotate_halves,
    round_to_bfloat16,
    scale_softmax,
    see_the_future,
    set_eps,
    set_input,
    set_op,
    shift_embedding,
    shift_scales,
    sigmoid_for_silu,
    skip_the_final_norm,
    smallest_experts,
    softmax_router,
    swap_dense_gate_and_up,
    swap_expert_columns,
    swap_two_experts,
    time_of_one_frame,
    weigh_with_the_bias,
    wrong_frequencies,
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`inject` breaks a build; `bisect` must name `component`, an op of type `op`, the reference's `tap` and `kind`.

    `tap` may name several (outputs of one op), `|` between them. `stage` is the tensor inside the op's body, where it
    has to say so. `check` is the section of the report that fails, where that is not the component itself.
    """

    name: str
    inject: Callable[[Build], None]
    component: str
    op: str
    tap: str
    kind: str
    stage: str = ""
    check: str = ""


def _fault(name: str, inject: Callable[[Build], None], where: str, kind: str, **more: str) -> Fault:
    """`where` is "component op tap"."""
    component_name, op, tap = where.split()
    return Fault(name=name, inject=inject, component=component_name, op=op, tap=tap, kind=kind, **more)


_MLA = "moe_layer k25.MLA self_attn.attended|cache_out"
_CACHE = _MLA
_EXPERTS = "moe_layer k25.MoEDispatch mlp.experts"
_DEQUANTIZE = "DequantizeInt4"

FAULTS: tuple[Fault, ...] = (
    _fault(
        "temporal position at t = 1",
        change_vision_inputs("position_embedding", time_of_one_frame),
        "vision input position_embedding",
        "inputs",
    ),
    _fault(
        "row and column rope exchanged",
        change_vision_inputs("rope_tables", exchange_rows_and_columns),
        "vision input rope_cos",
        "inputs",
    ),
    _fault(
        "patches merged down first",
        change_vision_inputs("merge_index", merge_down_first),
        "vision input merge_index",
        "inputs",
    ),
    _fault(
        "exact GELU in the tower",
        graph("vision", exact_gelu),
        "vision Gelu vision_tower.encoder.blocks.0.gelu",
        "graph",
    ),
    _fault(
        "kernel: bf16 vision attention",
        other_kernel(lambda model: round_to_bfloat16(function(model, "VisionAttention").node, "out_float")),
        "vision k25.VisionAttention vision_tower.encoder.blocks.0.attended",
        "kernel",
    ),
    _fault("nibble order swapped", graph("moe_layer", reverse_nibbles), _EXPERTS, "graph", stage="nibble"),
    _fault("offset of 8 lost", graph("moe_layer", lose_the_offset), _EXPERTS, "graph", stage="value"),
    _fault("group scales shifted by one", graph("moe_layer", roll_scales), _EXPERTS, "graph", stage="scale"),
    _fault("scales bound 8 bytes early", manifest(shift_scales), _EXPERTS, "binding"),
    _fault("gate and up exchanged", manifest(swap_expert_columns([2, 3, 0, 1, 4, 5])), _EXPERTS, "binding"),
    _fault("gate and up scales exchanged", manifest(swap_expert_columns([0, 3, 2, 1, 4, 5])), _EXPERTS, "binding"),
    _fault(
        "dense gate and up exchanged",
        manifest(swap_dense_gate_and_up),
        "dense_layer k25.Linear mlp.gate_proj",
        "binding",
    ),
    _fault("two experts swapped", manifest(swap_two_experts), _EXPERTS, "binding"),
    _fault(
        "a layer's weights bound to another",
        manifest(bind("moe_layer", "self_attn.o_proj.weight", of_first_layer)),
        "moe_layer k25.Linear self_attn.o_proj",
        "binding",
    ),
    _fault(
        "kv_b of another layer",
        manifest(bind("moe_layer", "self_attn.kv_b_proj.weight", of_first_layer)),
        _MLA,
        "binding",
    ),
    _fault("embedding one row off", manifest(shift_embedding), "embed Gather model.embed_tokens", "binding"),
    _fault(
        "head tied to the embedding",
        manifest(bind("head", "lm_head.weight", lambda name, entry: "language_model.model.embed_tokens.weight")),
        "head k25.Linear lm_head",
        "binding",
    ),
    _fault("rope interleaving", graph("moe_layer", rotate_halves), _CACHE, "graph", stage="q_"),
    _fault(
        "wrong beta_fast",
        wrong_frequencies("dense_layer", beta_fast_of_one),
        "dense_layer k25.MLA self_attn.attended|cache_out",
        "attribute",
        stage="angle",
    ),
    _fault("no YaRN", wrong_frequencies("moe_layer", no_yarn), _CACHE, "attribute", stage="angle"),
    _fault("mscale missing", scale_softmax(lambda config: mscale(config) ** -2), _MLA, "attribute", stage="scaled"),
    _fault("mscale not squared", scale_softmax(lambda config: 1 / mscale(config)), _MLA, "attribute", stage="scaled"),
    _fault(
        "softmax scale without the rope",
        scale_softmax(lambda c: ((c.qk_nope_head_dim + c.qk_rope_head_dim) / c.qk_nope_head_dim) ** 0.5),
        _MLA,
        "attribute",
        stage="scaled",
    ),
    _fault(
        "key not rotated",
        graph("moe_layer", body("MLA", "new_rows", set_input(1, "k_rope"))),
        _CACHE,
        "graph",
        stage="new_rows",
    ),
    _fault("kv_b halves exchanged", graph("moe_layer", exchange_kv_b), _MLA, "graph", stage="u"),
    _fault(
        "causal off by one",
        graph("moe_layer", body("MLA", "is_hidden", set_op("GreaterOrEqual"))),
        _MLA,
        "graph",
        stage="is_hidden",
    ),
    _fault("sees the next token", graph("moe_layer", see_the_future), _MLA, "graph", stage="is_hidden"),
    _fault(
        "slot overwritten", graph("moe_layer", body("MLA", "slot", set_input(1, "two"))), _CACHE, "graph", stage="slot"
    ),
    _fault(
        "cache block misplaced",
        change_batches(misplace_a_block),
        "dense_layer input block_table",
        "inputs",
        check="decode",
    ),
    _fault(
        "positions one late in decode",
        change_batches(positions_one_late),
        "dense_layer input positions",
        "inputs",
        check="decode",
    ),
    _fault(
        "blocks of the neighbour",
        change_batches(blocks_of_the_neighbour),
        "dense_layer input block_table",
        "inputs",
        check="batch",
    ),
    _fault(
        "eps 1e-5 for 1e-6",
        graph("moe_layer", set_eps(1e-6, 1e-5)),
        "moe_layer Add self_attn.q_a_layernorm.plus_eps",
        "constant",
    ),
    _fault(
        "eps 1e-6 for 1e-5",
        graph("moe_layer", set_eps(1e-5, 1e-6)),
        "moe_layer Add input_layernorm.plus_eps",
        "constant",
    ),
    _fault(
        "eps 1e-6 for 1e-5 in the head", graph("head", set_eps(1e-5, 1e-6)), "head Add model.norm.plus_eps", "constant"
    ),
    _fault(
        "norm weight plus one", graph("moe_layer", norm_weight_plus_one), "moe_layer Add self_attn.latent", "wiring"
    ),
    _fault(
        "residual after the norm", graph("moe_layer", residual_after_norm), "moe_layer Add attention_residual", "wiring"
    ),
    _fault("router bias ignored", graph("moe_layer", ignore_the_bias), "moe_layer Add mlp.gate.biased", "wiring"),
    _fault(
        "router bias in the weights",
        graph("moe_layer", weigh_with_the_bias),
        "moe_layer GatherElements mlp.gate.chosen",
        "wiring",
    ),
    _fault(
        "scaling factor lost", graph("moe_layer", lose_the_scaling_factor), "moe_layer Mul mlp.gate.weights", "constant"
    ),
    _fault(
        "weights not normalised", graph("moe_layer", lose_the_normalisation), "moe_layer Mul mlp.gate.weights", "wiring"
    ),
    _fault(
        "softmax for sigmoid in the router",
        graph("moe_layer", softmax_router),
        "moe_layer Softmax mlp.gate.scores",
        "wiring",
    ),
    _fault("smallest experts", graph("moe_layer", smallest_experts), "moe_layer TopK mlp.gate.ids", "graph"),
    _fault("shared expert dropped", graph("moe_layer", drop_the_shared_expert), "moe_layer Add mlp", "wiring"),
    _fault("sigmoid for SiLU", graph("moe_layer", sigmoid_for_silu), "moe_layer Mul mlp.shared_experts.silu", "wiring"),
    _fault("final norm skipped", graph("head", skip_the_final_norm), "head k25.Linear lm_head", "wiring"),
    _fault(
        "bf16 accumulation",
        graph("dense_layer", bfloat16_linear),
        "dense_layer k25.Linear self_attn.q_a_proj",
        "graph",
        stage="y",
    ),
    _fault("bf16 sum of experts", graph("moe_layer", bfloat16_sum_of_experts), _EXPERTS, "graph", stage="weighted"),
    _fault("bf16 router", graph("moe_layer", bfloat16_router), "moe_layer Cast mlp.gate.logits", "graph"),
    _fault("a flipped bit in one scale", damage_scale(flip_a_bit), _EXPERTS, "bytes"),
    _fault("one NaN", damage_scale(nan_first, both=True), _EXPERTS, "checkpoint"),
    _fault(
        "kernel: bf16 accumulation",
        other_kernel(bfloat16_linear),
        "dense_layer k25.Linear self_attn.q_a_proj",
        "kernel",
    ),
    _fault(
        "kernel: causal off by one",
        other_kernel(body("MLA", "is_hidden", set_op("GreaterOrEqual"))),
        "dense_layer k25.MLA self_attn.attended|cache_out",
        "kernel",
    ),
    _fault("kernel: nibble order", other_kernel(reverse_nibbles), _EXPERTS, "kernel"),
)


# What validate and bisect make of a fault.


@dataclass(frozen=True, kw_only=True)
class Caught:
    """Both verdicts, and the figures of the table in docs/parity.md."""

    fault: Fault
    report: Any
    bisection: Any

    @property
    def checks(self) -> list[Any]:
        """The failed checks that the fault should fail."""
        prefix = self.fault.check or self.fault.component
        return [c for c in self.report.failures if c.name.startswith(prefix) or c.section == prefix]

    @property
    def smallest(self) -> Any:
        """Of these, the relative L2 that fails by the least; the systematic gain, where that is clearer."""
        by_metric = {c.metric: [d for d in self.checks if d.metric == c.metric] for c in self.checks}
        least = {metric: min(checks, key=lambda c: c.value) for metric, checks in by_metric.items()}
        error = least.get("relative L2", self.checks[0])
        gain = least.get("systematic gain", error)
        return max(error, gain, key=_margin) if _margin(error) < CLEAR else error

    @property
    def is_found(self) -> bool:
        """Whether bisect names the right component, op, tensor, kind and stage."""
        found, fault = self.bisection.divergence, self.fault
        return (
            found is not None
            and (found.component, found.op, found.kind) == (fault.component, fault.op, fault.kind)
            and found.tap in fault.tap.split("|")
            and (not fault.stage or (bool(found.stages) and fault.stage in found.stages[-1]))
        )


#: A margin that needs no second opinion.
CLEAR = 10.0


def _margin(check: Any) -> float:
    return float(check.value / check.tolerance.value) if check.tolerance.value else float("inf")


def caught(fault: Fault, exported: Any, folder: Path, **options: Any) -> Caught:
    """Break a build in this way, validate it and bisect it, with the same prompts."""
    from k25_validate.bisect import bisect_bundle
    from k25_validate.validation import parity_report_from_bundle

    if fault.component != "vision":
        options.setdefault("samples", ())
    build = build_from(exported, folder)
    fault.inject(build)
    where = {"checkpoint": build.checkpoint, "reference_checkpoint": build.reference, "threads": 1, **options}
    with build.patched():
        report = parity_report_from_bundle(build.bundle, **where)
        bisection = bisect_bundle(build.bundle, **where, output=folder / "reproducer")
    return Caught(fault=fault, report=report, bisection=bisection)
