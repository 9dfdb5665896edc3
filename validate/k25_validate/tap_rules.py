"""Which tensor of a traced graph is which value of the reference: by structure and by the weights that feed it.

A rule says what makes a tap: an op on other taps, weights (`W:` name of the weight input) and activation inputs
(`A:`). Constants take no part in the matching, so a wrong constant still finds its place. Nothing depends on the names
of tensors, only on ops, wiring, weight inputs and the fixed names of a component's outputs. Casts, and transposes of a
weight, are looked through: what they make has the tap of what they read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from k25_plugins.errors import mismatch
from k25_validate.graph_prefix import StraightGraph

_LOOKED_THROUGH = ("Cast", "CastLike", "Identity", "Transpose")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`tap` is output `output` of an `op` that reads `reads`, in any order."""

    tap: str
    op: str
    reads: tuple[str, ...]
    output: int = 0


@dataclass(frozen=True, kw_only=True)
class TapMap:
    """`taps` maps tensors of the graph to taps, `wired` nodes that are wired otherwise than their rule to what differs.

    `unmatched` are nodes that no formula has, `missing` taps that no tensor of the graph has.
    """

    taps: Mapping[str, str]
    wired: Mapping[int, str] = field(default_factory=dict)
    unmatched: frozenset[int] = frozenset()
    missing: tuple[str, ...] = ()


def _norm(name: str, x: str) -> Rule:
    return Rule(tap=name, op="RMSNorm", reads=(x, f"W:{name}.weight"))


def _linear(name: str, x: str) -> Rule:
    return Rule(tap=name, op="Linear", reads=(x, f"W:{name}.weight"))


def _swiglu(name: str, x: str) -> list[Rule]:
    return [
        _linear(f"{name}.gate_proj", x),
        Rule(tap=f"{name}.sigmoid", op="Sigmoid", reads=(f"{name}.gate_proj",)),
        Rule(tap=f"{name}.silu", op="Mul", reads=(f"{name}.gate_proj", f"{name}.sigmoid")),
        _linear(f"{name}.up_proj", x),
        Rule(tap=f"{name}.gated", op="Mul", reads=(f"{name}.silu", f"{name}.up_proj")),
        _linear(f"{name}.down_proj", f"{name}.gated"),
    ]


_ATTENTION = [
    _norm("input_layernorm", "A:hidden"),
    _linear("self_attn.q_a_proj", "input_layernorm"),
    _norm("self_attn.q_a_layernorm", "self_attn.q_a_proj"),
    _linear("self_attn.q_b_proj", "self_attn.q_a_layernorm"),
    _linear("self_attn.kv_a_proj_with_mqa", "input_layernorm"),
    Rule(tap="self_attn.compressed", op="Split", reads=("self_attn.kv_a_proj_with_mqa",)),
    Rule(tap="self_attn.k_rope", op="Split", reads=("self_attn.kv_a_proj_with_mqa",), output=1),
    _norm("self_attn.kv_a_layernorm", "self_attn.compressed"),
    Rule(tap="self_attn.latent", op="Concat", reads=("self_attn.kv_a_layernorm", "self_attn.k_rope")),
    *(
        Rule(
            tap=tap,
            op="MLA",
            reads=(
                "self_attn.q_b_proj",
                "self_attn.latent",
                "A:cache",
                "W:self_attn.kv_b_proj.weight",
                "A:positions",
                "A:query_start",
                "A:block_table",
            ),
            output=output,
        )
        for output, tap in enumerate(("self_attn.attended", "cache_out"))
    ),
    _linear("self_attn.o_proj", "self_attn.attended"),
    Rule(tap="attention_residual", op="Add", reads=("A:hidden", "self_attn.o_proj")),
    _norm("post_attention_layernorm", "attention_residual"),
]

_ROUTER = [
    Rule(tap="mlp.gate.logits", op="Linear", reads=("post_attention_layernorm", "W:mlp.gate.weight")),
    *(
        Rule(tap=tap, op="Router", reads=("mlp.gate.logits", "W:mlp.gate.e_score_correction_bias"), output=output)
        for output, tap in enumerate(("mlp.gate.ids", "mlp.gate.weights"))
    ),
]

_EXPERT_READS = (
    "post_attention_layernorm",
    "mlp.gate.ids",
    "mlp.gate.weights",
    "W:expert_words",
    "W:expert_scales",
    "W:expert_table",
)

RULES: Mapping[str, Sequence[Rule]] = {
    "embed": [Rule(tap="model.embed_tokens", op="Gather", reads=("A:token_ids", "W:model.embed_tokens.weight"))],
    "dense_layer": [
        *_ATTENTION,
        *_swiglu("mlp", "post_attention_layernorm"),
        Rule(tap="hidden_out", op="Add", reads=("attention_residual", "mlp.down_proj")),
    ],
    "moe_layer": [
        *_ATTENTION,
        *_ROUTER,
        Rule(tap="mlp.experts", op="MoEDispatch", reads=_EXPERT_READS),
        *_swiglu("mlp.shared_experts", "post_attention_layernorm"),
        Rule(tap="mlp.shared_experts", op="Mul", reads=("mlp.shared_experts.down_proj", "A:residual_share")),
        Rule(tap="mlp", op="Add", reads=("mlp.experts", "mlp.shared_experts")),
        Rule(tap="shared_residual", op="Mul", reads=("attention_residual", "A:residual_share")),
        Rule(tap="hidden_out", op="Add", reads=("shared_residual", "mlp")),
    ],
    "head": [
        Rule(tap="rows", op="Gather", reads=("A:hidden", "A:rows")),
        _norm("model.norm", "rows"),
        _linear("lm_head", "model.norm"),
    ],
}

_OUTPUTS = {
    "hidden_out": "hidden_out",
    "cache_out": "cache_out",
    "expert_ids": "mlp.gate.ids",
    "expert_weights": "mlp.gate.weights",
    "logits": "lm_head",
    "hidden": "model.embed_tokens",
    "media_embeddings": "mm_projector.proj.2",
}


def tap_map(
    component: str, graph: StraightGraph, *, weights: Sequence[str], rules: Sequence[Rule] | None = None
) -> TapMap:
    """Find the tap of every tensor that has one; first by exact rules and by weights, then by what is left of them.

    `rules` default to those of the component.
    """
    if rules is None:
        rules = RULES[component]
        _require_ops_of(component, graph, rules)
    matcher = _Matcher(rules, graph, weights)
    matcher.match(allow_partial=False)
    matcher.match(allow_partial=True)
    matcher.anchor_outputs()
    missing = tuple(rule.tap for rule in rules if rule.tap not in matcher.taps.values())
    return TapMap(taps=matcher.taps, wired=matcher.wired, unmatched=matcher.unmatched, missing=missing)


def _require_ops_of(component: str, graph: StraightGraph, rules: Sequence[Rule]) -> None:
    """Bundles of before `k25.RMSNorm` have its formula as plain nodes, which no rule knows."""
    ops = {node.op_type for node in graph.nodes}
    if any(rule.op == "RMSNorm" for rule in rules) and "RMSNorm" not in ops and "ReduceMean" in ops:
        raise mismatch(
            f"component {component}",
            expected="nodes k25.RMSNorm",
            found="its formula as plain nodes: the bundle was exported by an older version. Export it again",
        )


class _Matcher:
    def __init__(self, rules: Sequence[Rule], graph: StraightGraph, weights: Sequence[str]) -> None:
        self._rules = list(rules)
        self._graph = graph
        self._matched: set[int] = set()
        self.taps: dict[str, str] = {}
        self.wired: dict[int, str] = {}
        activations = (value.name for value in graph.model.graph.input)
        self._symbols = {name: f"W:{name}" if name in weights else f"A:{name}" for name in activations}

    def match(self, *, allow_partial: bool) -> None:
        """Go through the nodes in order, giving each that has none yet a rule."""
        for index, node in enumerate(self._graph.nodes):
            if index not in self._matched:
                self._match_node(index, node, allow_partial=allow_partial)

    @property
    def unmatched(self) -> frozenset[int]:
        """The nodes that have no rule, are not looked through and make more than shapes."""
        nodes = self._graph.nodes
        left = frozenset(range(len(nodes))) - self._matched
        return frozenset(
            index for index in left if not all(self._is_integer(name) for name in nodes[index].output if name)
        )

    def anchor_outputs(self) -> None:
        """What is left are outputs, whose names the format fixes."""
        for value in self._graph.model.graph.output:
            if value.name in self.taps:
                continue
            tap = self.taps[value.name] = _OUTPUTS.get(value.name, value.name)
            rule = next((rule for rule in self._rules if rule.tap == tap), None)
            index = self._graph.producers[value.name]
            if rule is not None and index not in self._matched:
                node = self._graph.nodes[index]
                self.wired[index] = _wiring(rule, node.op_type, self._reads_of(node))

    def _reads_of(self, node: onnx.NodeProto) -> tuple[str, ...]:
        """What a node reads, without constants and without integers of the graph that say shapes only."""
        return tuple(
            self._symbols.get(name, f"?{name}")
            for name in node.input
            if name and name not in self._graph.constants and (name in self._symbols or not self._is_integer(name))
        )

    def _is_integer(self, name: str) -> bool:
        return self._graph.element_types.get(name) in (onnx.TensorProto.INT32, onnx.TensorProto.INT64)

    def _match_node(self, index: int, node: onnx.NodeProto, *, allow_partial: bool) -> None:
        reads = self._reads_of(node)
        rules = self._chosen_rules(node, reads, allow_partial=allow_partial)
        if rules:
            self._matched.add(index)
            for rule in rules:
                self._assign(node.output[rule.output], rule.tap)
                self._rules.remove(rule)
            if Counter(rules[0].reads) != Counter(reads) or rules[0].op != node.op_type:
                self.wired[index] = _wiring(rules[0], node.op_type, reads)
        elif self._is_looked_through(node, reads):
            self._symbols[node.output[0]] = reads[0]
            if not reads[0].startswith(("W:", "A:", "?")):
                self.taps[node.output[0]] = reads[0]
            if not reads[0].startswith("?"):
                self._matched.add(index)

    def _assign(self, tensor: str, tap: str) -> None:
        self.taps[tensor] = self._symbols[tensor] = tap

    @staticmethod
    def _is_looked_through(node: onnx.NodeProto, reads: tuple[str, ...]) -> bool:
        if node.op_type == "Reshape":
            return bool(reads) and reads[0].startswith(("A:", "W:"))
        return bool(reads) and node.op_type in _LOOKED_THROUGH and (node.op_type != "Transpose" or reads[0][:2] == "W:")

    def _chosen_rules(self, node: onnx.NodeProto, reads: tuple[str, ...], *, allow_partial: bool) -> list[Rule]:
        """The rules of this node's outputs: the exact one, else the one of its weight, else the most alike."""
        rules = [rule for rule in self._rules if rule.op == node.op_type and rule.output < len(node.output)]
        exact = [rule for rule in rules if Counter(rule.reads) == Counter(reads)]
        if exact:
            return [exact[0], *(rule for rule in exact[1:] if rule.output != exact[0].output)]
        own = {name for name in reads if name.startswith("W:")}
        anchored = [rule for rule in rules if own and own & set(rule.reads)]
        if anchored:
            return anchored
        if not allow_partial:
            return []
        other_op = [rule for rule in self._rules if Counter(rule.reads) == Counter(reads) and rule.output == 0]
        if len(other_op) == 1 and node.op_type not in _LOOKED_THROUGH:
            return other_op
        alike = [rule for rule in rules if set(rule.reads) & set(reads)]
        best = max((len(set(rule.reads) & set(reads)) for rule in alike), default=0)
        chosen = [rule for rule in alike if len(set(rule.reads) & set(reads)) == best]
        return chosen if len({rule.tap for rule in chosen if rule.output == 0}) <= 1 else chosen[:1]


def _wiring(rule: Rule, op: str, reads: Sequence[str]) -> str:
    """In words, how a node differs from its rule."""
    if op != rule.op:
        return f"the op is {op}, the formula's {rule.op}"
    return f"the op reads {_names(reads)}, the formula {_names(rule.reads)}"


def _names(reads: Sequence[str]) -> str:
    return ", ".join(name.removeprefix("W:").removeprefix("A:").removeprefix("?") for name in reads)
