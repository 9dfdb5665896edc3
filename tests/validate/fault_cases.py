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
    bfloat16,
    bfloat16_router,
    bfloat16_sum_of_experts,
    bind,
    body,
    build_from,
    centre_the_norm,
    drop_the_shared_expert,
    eps_outside_the_root,
    exact_gelu,
    exchange_kv_b,
    graph,
    ignore_the_bias,
    lose_the_normalisation,
    lose_the_offset,
    lose_the_scaling_factor,
    manifest,
    mscale,
    no_yarn,
    norm_weight_plus_one,
    of_first_layer,
    residual_after_norm,
    reverse_nibbles,
    roll_scales,
    rotate_halves,
    scale_softmax,
    see_the_future,
    set_attribute,
    set_eps,
    set_input,
    set_op,
    shift_embedding,
    shift_scales,
    sigmoid_for_silu,
    skip_the_final_norm,
    skip_the_latent_norm,
    smallest_experts,
    softmax_router,
    swap_dense_gate_and_up,
    swap_expert_columns,
    swap_two_experts,
    weigh_with_the_bias,
    wrong_frequencies,
)
from fault_runtime import (
    blocks_of_the_neighbour,
    change_batches,
    change_vision_inputs,
    damage_scale,
    exchange_rows_and_columns,
    flip_a_bit,
    merge_down_first,
    misplace_a_block,
    nan_first,
    other_kernel,
    positions_one_late,
    time_of_one_frame,
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
_NORM = "moe_layer k25.RMSNorm input_layernorm"
_ROUTER = "moe_layer k25.Router mlp.gate.ids|mlp.gate.weights"
_WEIGHTS = "moe_layer k25.Router mlp.gate.weights"
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
        other_kernel(bfloat16("VisionAttention", "out_float")),
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
        "moe_layer k25.RMSNorm self_attn.q_a_layernorm",
        "attribute",
        stage="plus_eps",
    ),
    _fault("eps 1e-6 for 1e-5", graph("moe_layer", set_eps(1e-5, 1e-6)), _NORM, "attribute", stage="plus_eps"),
    _fault(
        "eps 1e-6 for 1e-5 in the head",
        graph("head", set_eps(1e-5, 1e-6)),
        "head k25.RMSNorm model.norm",
        "attribute",
        stage="plus_eps",
    ),
    _fault(
        "eps 1e-6 for 1e-5 in one norm",
        graph("moe_layer", set_attribute("RMSNorm", "eps", 1e-6, "post_attention_layernorm.weight")),
        "moe_layer k25.RMSNorm post_attention_layernorm",
        "attribute",
        stage="plus_eps",
    ),
    _fault("eps outside the root", graph("moe_layer", eps_outside_the_root), _NORM, "graph", stage="root"),
    _fault("norm with the mean taken off", graph("moe_layer", centre_the_norm), _NORM, "graph", stage="wide"),
    _fault("norm weight plus one", graph("moe_layer", norm_weight_plus_one), _NORM, "graph", stage="weight_x"),
    _fault("bf16 norm", graph("moe_layer", bfloat16("RMSNorm", "normed")), _NORM, "graph", stage="normed"),
    _fault(
        "norm weight of another norm",
        manifest(
            bind("moe_layer", "input_layernorm.weight", lambda name, entry: name.replace("input", "post_attention"))
        ),
        _NORM,
        "binding",
    ),
    _fault(
        "latent norm skipped", graph("moe_layer", skip_the_latent_norm), "moe_layer Concat self_attn.latent", "wiring"
    ),
    _fault(
        "residual after the norm", graph("moe_layer", residual_after_norm), "moe_layer Add attention_residual", "wiring"
    ),
    _fault("router bias ignored", graph("moe_layer", ignore_the_bias), _ROUTER, "graph", stage="biased"),
    _fault(
        "router bias of another layer",
        manifest(bind("moe_layer", "mlp.gate.e_score_correction_bias", of_first_layer)),
        _ROUTER,
        "binding",
    ),
    _fault("router bias in the weights", graph("moe_layer", weigh_with_the_bias), _WEIGHTS, "graph", stage="chosen"),
    _fault(
        "scaling factor lost",
        graph("moe_layer", lose_the_scaling_factor),
        _WEIGHTS,
        "attribute",
        stage="expert_weights",
    ),
    _fault(
        "weights not normalised", graph("moe_layer", lose_the_normalisation), _WEIGHTS, "attribute", stage="divisor"
    ),
    _fault("softmax for sigmoid in the router", graph("moe_layer", softmax_router), _ROUTER, "graph", stage="scores"),
    _fault("smallest experts", graph("moe_layer", smallest_experts), _ROUTER, "graph", stage="ids"),
    _fault("bf16 router scores", graph("moe_layer", bfloat16("Router", "scores")), _ROUTER, "graph", stage="scores"),
    _fault("shared expert dropped", graph("moe_layer", drop_the_shared_expert), "moe_layer Add mlp", "wiring"),
    _fault("sigmoid for SiLU", graph("moe_layer", sigmoid_for_silu), "moe_layer Mul mlp.shared_experts.silu", "wiring"),
    _fault("final norm skipped", graph("head", skip_the_final_norm), "head k25.Linear lm_head", "wiring"),
    _fault(
        "bf16 accumulation",
        graph("dense_layer", bfloat16("Linear", "y")),
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
        other_kernel(bfloat16("Linear", "y")),
        "dense_layer k25.Linear self_attn.q_a_proj",
        "kernel",
    ),
    _fault(
        "kernel: bf16 norm",
        other_kernel(bfloat16("RMSNorm", "normed")),
        "dense_layer k25.RMSNorm input_layernorm",
        "kernel",
    ),
    _fault(
        "kernel: eps 1e-6 for 1e-5",
        other_kernel(set_eps(1e-5, 1e-6)),
        "dense_layer k25.RMSNorm input_layernorm",
        "kernel",
    ),
    _fault("kernel: router bias ignored", other_kernel(ignore_the_bias), _ROUTER, "kernel"),
    _fault("kernel: weights not normalised", other_kernel(lose_the_normalisation), _WEIGHTS, "kernel"),
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
