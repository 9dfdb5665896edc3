"""The checkpoint's language model as a GGUF file for llama.cpp (architecture deepseek2), with numpy and `gguf` alone.

    PEER/bin/python bench/peers/gguf_file.py CHECKPOINT FILE.gguf {bf16,q4_0}

Routed experts become Q4_0 as they are: both formats hold nibble - 8 in groups of 32 with one scale. GGUF's scale is
float16, the checkpoint's bfloat16: exact from 2**-17 to 65504, rounded below; the script prints the largest relative
error. The rest is bfloat16 as stored, or rounded to Q4_0 by `gguf`; norms, router and its bias are float32. There is no
tokenizer in the file (`no_vocab`): token ids go in and logits come out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_DTYPES = {"BF16": np.uint16, "F32": np.float32, "I32": np.int32, "I64": np.int64}
_PLAIN = {
    "input_layernorm": "attn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
_PROJECTIONS = ("gate", "up", "down")


class Checkpoint:
    """The tensors of the language model, mapped."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, Array] = {}
        for path in sorted(folder.glob("*.safetensors")):
            data = np.memmap(path, np.uint8, "r")
            size = int(data[:8].view("<u8")[0])
            for name, entry in json.loads(bytes(data[8 : 8 + size])).items():
                if name != "__metadata__":
                    start, stop = (8 + size + offset for offset in entry["data_offsets"])
                    values = np.array(data[start:stop]).view(_DTYPES[entry["dtype"]])
                    self._tensors[name.removeprefix("language_model.")] = values.reshape(entry["shape"])

    def bits(self, name: str) -> Array:
        """As stored; bfloat16 as uint16."""
        return self._tensors[name]

    def floats(self, name: str) -> Array:
        """float32 values of a bfloat16 or float32 tensor."""
        return floats_of(self._tensors[name])


def floats_of(values: Array) -> Array:
    """bfloat16 bits as float32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values


def q4_0(words: Array, scales: Array) -> tuple[Array, float]:
    """int32 words [out, in / 8] and bfloat16 scales [out, in / 32] as rows of Q4_0, and the scales' largest error.

    A block of Q4_0 is a float16 scale and 16 bytes: byte j holds value j in its low nibble, j + 16 in its high.
    """
    octets = words.view(np.uint8).reshape(*scales.shape, 16)
    nibbles = np.stack([octets & 15, octets >> 4], axis=-1).reshape(*scales.shape, 32)
    exact = floats_of(scales)
    halves = exact.astype(np.float16)
    error = float(np.max(np.abs(halves.astype(np.float32) - exact) / np.maximum(np.abs(exact), 1e-30)))
    blocks = np.empty((*scales.shape, 18), np.uint8)
    blocks[..., :2] = halves[..., None].view(np.uint8)
    blocks[..., 2:] = nibbles[..., :16] | nibbles[..., 16:] << 4
    return blocks.reshape(len(words), -1), error


class Writer:
    """A GGUFWriter that knows the two formats."""

    def __init__(self, path: Path, dense: str) -> None:
        self.file = gguf.GGUFWriter(str(path), "deepseek2")
        self.dense = dense
        self.scale_error = 0.0

    def matrix(self, name: str, bits: Array) -> None:
        """A bfloat16 tensor in the format of the rest."""
        if self.dense == "bf16":
            data = np.ascontiguousarray(bits)
            self.file.add_tensor(name, data.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            kind = gguf.GGMLQuantizationType.Q4_0
            self.file.add_tensor(
                name, gguf.quants.quantize(np.ascontiguousarray(floats_of(bits)), kind), raw_dtype=kind
            )

    def floats(self, name: str, values: Array) -> None:
        """A float32 tensor."""
        self.file.add_tensor(name, np.ascontiguousarray(values, np.float32))

    def experts(self, name: str, packed: list[Array], scales: list[Array]) -> None:
        """Experts' matrices as one tensor of Q4_0."""
        found = [q4_0(words, scale) for words, scale in zip(packed, scales, strict=True)]
        self.scale_error = max(self.scale_error, *(error for _, error in found))
        self.file.add_tensor(name, np.stack([rows for rows, _ in found]), raw_dtype=gguf.GGMLQuantizationType.Q4_0)


def add_configuration(file: Any, text: dict[str, Any]) -> None:
    """The hyperparameters, as llama.cpp reads them for multi-head latent attention in its absorbed form."""
    rope = text["rope_scaling"]
    file.add_context_length(text["max_position_embeddings"])
    file.add_embedding_length(text["hidden_size"])
    file.add_block_count(text["num_hidden_layers"])
    file.add_feed_forward_length(text["intermediate_size"])
    file.add_head_count(text["num_attention_heads"])
    file.add_head_count_kv(1)
    file.add_layer_norm_rms_eps(text["rms_norm_eps"])
    file.add_leading_dense_block_count(text["first_k_dense_replace"])
    file.add_vocab_size(text["vocab_size"])
    file.add_q_lora_rank(text["q_lora_rank"])
    file.add_kv_lora_rank(text["kv_lora_rank"])
    file.add_key_length(text["kv_lora_rank"] + text["qk_rope_head_dim"])
    file.add_value_length(text["kv_lora_rank"])
    file.add_key_length_mla(text["qk_nope_head_dim"] + text["qk_rope_head_dim"])
    file.add_value_length_mla(text["v_head_dim"])
    file.add_rope_dimension_count(text["qk_rope_head_dim"])
    file.add_rope_freq_base(text["rope_theta"])
    file.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    file.add_rope_scaling_factor(rope["factor"])
    file.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    file.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    file.add_expert_count(text["n_routed_experts"])
    file.add_expert_used_count(text["num_experts_per_tok"])
    file.add_expert_shared_count(text["n_shared_experts"])
    file.add_expert_feed_forward_length(text["moe_intermediate_size"])
    file.add_expert_weights_scale(text["routed_scaling_factor"])
    file.add_expert_weights_norm(text["norm_topk_prob"])
    file.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    file.add_tokenizer_model("no_vocab")


def add_layer(writer: Writer, checkpoint: Checkpoint, text: dict[str, Any], layer: int) -> None:
    """One decoder layer."""
    source, target = f"model.layers.{layer}", f"blk.{layer}"
    for name, other in _PLAIN.items():
        if name.endswith("norm"):
            writer.floats(f"{target}.{other}.weight", checkpoint.floats(f"{source}.{name}.weight"))
        else:
            writer.matrix(f"{target}.{other}.weight", checkpoint.bits(f"{source}.{name}.weight"))
    nope, heads = text["qk_nope_head_dim"], text["num_attention_heads"]
    both = checkpoint.bits(f"{source}.self_attn.kv_b_proj.weight").reshape(heads, nope + text["v_head_dim"], -1)
    writer.matrix(f"{target}.attn_k_b.weight", both[:, :nope].transpose(0, 2, 1))
    writer.matrix(f"{target}.attn_v_b.weight", both[:, nope:])
    if layer < text["first_k_dense_replace"]:
        for name in _PROJECTIONS:
            writer.matrix(f"{target}.ffn_{name}.weight", checkpoint.bits(f"{source}.mlp.{name}_proj.weight"))
        return
    writer.floats(f"{target}.ffn_gate_inp.weight", checkpoint.floats(f"{source}.mlp.gate.weight"))
    writer.floats(f"{target}.exp_probs_b.bias", checkpoint.floats(f"{source}.mlp.gate.e_score_correction_bias"))
    for name in _PROJECTIONS:
        shared = checkpoint.bits(f"{source}.mlp.shared_experts.{name}_proj.weight")
        writer.matrix(f"{target}.ffn_{name}_shexp.weight", shared)
        stems = [f"{source}.mlp.experts.{expert}.{name}_proj" for expert in range(text["n_routed_experts"])]
        packed = [checkpoint.bits(f"{stem}.weight_packed") for stem in stems]
        scales = [checkpoint.bits(f"{stem}.weight_scale") for stem in stems]
        writer.experts(f"{target}.ffn_{name}_exps.weight", packed, scales)


def write_gguf(folder: Path, path: Path, dense: str) -> float:
    """Write the file; returns the largest relative error of a scale."""
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    checkpoint, writer = Checkpoint(folder), Writer(path, dense)
    add_configuration(writer.file, text)
    writer.matrix("token_embd.weight", checkpoint.bits("model.embed_tokens.weight"))
    writer.matrix("output.weight", checkpoint.bits("lm_head.weight"))
    writer.floats("output_norm.weight", checkpoint.floats("model.norm.weight"))
    for layer in range(text["num_hidden_layers"]):
        add_layer(writer, checkpoint, text, layer)
    writer.file.write_header_to_file()
    writer.file.write_kv_data_to_file()
    writer.file.write_tensors_to_file()
    writer.file.close()
    return writer.scale_error


def main() -> None:
    """Write, and say how exact the experts' scales are."""
    folder, path, dense = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    temporary = path.with_suffix(".partial")
    error = write_gguf(folder, temporary, dense)
    temporary.rename(path)
    print(json.dumps({"bytes": path.stat().st_size, "largest_relative_error_of_a_scale": error}))


if __name__ == "__main__":
    main()
