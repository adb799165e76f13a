"""Shapes of published models, by name."""

from specjax.models.config import DecoderConfig


def _chinchilla(num_layers: int, hidden_size: int, intermediate_size: int) -> DecoderConfig:
    """A decoder of the Chinchilla family (Hoffmann et al. 2022, arXiv 2203.15556), as far as `DecoderConfig` goes.

    Its feed-forward is not gated and four times as wide as the model; here it is gated and 8/3 as wide (rounded to
    128), which makes as many parameters and operations. Positions are rotary in the place of Transformer-XL's, which
    have another projection of the width squared in every layer.
    """
    return DecoderConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=hidden_size // 128,
        num_kv_heads=hidden_size // 128,
        head_dim=128,
        max_position=2048,
        dtype="bfloat16",
    )


PRESETS: dict[str, DecoderConfig] = {
    "chinchilla_70b": _chinchilla(80, 8192, 21888),
    "chinchilla_draft_4b": _chinchilla(8, 6144, 16384),
    "chinchilla_7b": _chinchilla(32, 4096, 10880),
}
"""By name: target and draft of Chen et al. 2023 (arXiv 2302.01318, section 5.1), and a narrower, deeper draft."""


def get(name: str) -> DecoderConfig:
    """The shape of that name.

    Raises:
      ValueError: for a name that is not known.
    """
    if name not in PRESETS:
        raise ValueError(f"No preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
