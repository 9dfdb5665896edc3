"""The rules of `tap_rules` for the vision tower and the projector: one set for each block."""

from __future__ import annotations

from k25_validate.tap_rules import Rule

_TOWER = "vision_tower."
_PROJECTOR = "mm_projector."


def vision_rules(blocks: int) -> list[Rule]:
    """All rules of a tower with this many blocks."""
    patch = f"{_TOWER}patch_embed.proj"
    rules = [
        Rule(tap=f"{patch}.product", op="Linear", reads=("A:pixel_values", f"W:{patch}.weight")),
        Rule(tap=patch, op="Add", reads=(f"{patch}.product", f"W:{patch}.bias")),
        Rule(tap=f"{_TOWER}patch_embed", op="Add", reads=(patch, "A:position_embedding")),
    ]
    x = f"{_TOWER}patch_embed"
    for block in range(blocks):
        prefix = f"{_TOWER}encoder.blocks.{block}."
        rules += _block(prefix, x)
        x = f"{prefix}out"
    final = f"{_TOWER}encoder.final_layernorm"
    return [
        *rules,
        _norm(final, x),
        Rule(tap="merged_rows", op="Gather", reads=(final, "A:merge_index")),
        Rule(tap="merged_frames", op="Reshape", reads=("merged_rows",)),
        Rule(tap="merged", op="ReduceMean", reads=("merged_frames",)),
        _norm(f"{_PROJECTOR}pre_norm", "merged"),
        Rule(tap=f"{_PROJECTOR}flat", op="Reshape", reads=(f"{_PROJECTOR}pre_norm",)),
        *_linear(f"{_PROJECTOR}proj.0", f"{_PROJECTOR}flat"),
        Rule(tap=f"{_PROJECTOR}gelu", op="Gelu", reads=(f"{_PROJECTOR}proj.0",)),
        *_linear(f"{_PROJECTOR}proj.2", f"{_PROJECTOR}gelu"),
    ]


def _linear(name: str, x: str) -> list[Rule]:
    return [
        Rule(tap=f"{name}.product", op="Linear", reads=(x, f"W:{name}.weight")),
        Rule(tap=name, op="Add", reads=(f"{name}.product", f"W:{name}.bias")),
    ]


def _norm(name: str, x: str) -> Rule:
    return Rule(tap=name, op="LayerNormalization", reads=(x, f"W:{name}.weight", f"W:{name}.bias"))


def _block(p: str, x: str) -> list[Rule]:
    """One block that reads `x`; `p` is the prefix of its names."""

    def rule(tap: str, op: str, *reads: str, output: int = 0) -> Rule:
        names = tuple(name if name in ("cos", "sin") else p + name for name in reads)
        return Rule(tap=p + tap, op=op, reads=names, output=output)

    return [
        Rule(tap="cos", op="Unsqueeze", reads=("A:rope_cos",)),
        Rule(tap="sin", op="Unsqueeze", reads=("A:rope_sin",)),
        _norm(f"{p}norm0", x),
        *_linear(f"{p}wqkv", f"{p}norm0"),
        rule("qk", "Split", "wqkv"),
        rule("v", "Split", "wqkv", output=1),
        rule("pairs", "Reshape", "qk"),
        rule("first_", "Slice", "pairs"),
        rule("first", "Squeeze", "first_"),
        rule("second_", "Slice", "pairs"),
        rule("second", "Squeeze", "second_"),
        rule("first_cos", "Mul", "first", "cos"),
        rule("second_sin", "Mul", "second", "sin"),
        rule("first_rotated", "Sub", "first_cos", "second_sin"),
        rule("first_sin", "Mul", "first", "sin"),
        rule("second_cos", "Mul", "second", "cos"),
        rule("second_rotated", "Add", "first_sin", "second_cos"),
        rule("first_last", "Unsqueeze", "first_rotated"),
        rule("second_last", "Unsqueeze", "second_rotated"),
        rule("rotated_pairs", "Concat", "first_last", "second_last"),
        rule("rotated", "Reshape", "rotated_pairs"),
        rule("q", "Split", "rotated"),
        rule("k", "Split", "rotated", output=1),
        rule("attended", "VisionAttention", "q", "k", "v"),
        *_linear(f"{p}wo", f"{p}attended"),
        Rule(tap=f"{p}residual", op="Add", reads=(x, f"{p}wo")),
        _norm(f"{p}norm1", f"{p}residual"),
        *_linear(f"{p}mlp.fc0", f"{p}norm1"),
        rule("gelu", "Gelu", "mlp.fc0"),
        *_linear(f"{p}mlp.fc1", f"{p}gelu"),
        Rule(tap=f"{p}out", op="Add", reads=(f"{p}residual", f"{p}mlp.fc1")),
    ]
