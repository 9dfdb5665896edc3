"""YaRN rotary frequencies and the softmax scale of MLA, as DeepSeek-V3 and Kimi K2.5 define them.

Source: YaRN, arXiv 2309.00071, section 3.2 (NTK-by-parts) and 3.4 (attention scaling); DeepSeek-V3 folds the
attention scaling of `mscale_all_dim` into the softmax scale, squared.
"""

from __future__ import annotations

import math

from k25_export.config import TextConfig


def yarn_inverse_frequencies(config: TextConfig) -> tuple[float, ...]:
    """Radians per position of each rotated pair, [qk_rope_head_dim / 2], in double precision."""
    dim, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling

    def correction_index(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (2 * math.pi * rotations)
        return dim * math.log(turns) / (2 * math.log(base))

    low = max(math.floor(correction_index(yarn.beta_fast)), 0)
    high = min(math.ceil(correction_index(yarn.beta_slow)), dim - 1)
    width = max(high - low, 0.001)  # the reference code's guard against a division by zero
    frequencies = []
    for index in range(dim // 2):
        extrapolated = math.pow(base, -2 * index / dim)
        ramp = min(max((index - low) / width, 0.0), 1.0)
        frequencies.append(extrapolated * (1 - ramp) + extrapolated / yarn.factor * ramp)
    return tuple(frequencies)


def softmax_scale(config: TextConfig) -> float:
    """(nope + rope)^-0.5 * m^2 with m = 0.1 * mscale_all_dim * ln(factor) + 1."""
    yarn = config.rope_scaling
    mscale = 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0
    return mscale * mscale / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
