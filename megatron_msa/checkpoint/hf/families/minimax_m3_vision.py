"""MiniMax-M3's vision tower, projector and patch merge in the released multimodal layout.

The released configuration says `rope_mode` "3d": time, height and width each turn a third of a head.
transformers 5.17 keeps the field but turns time and height instead, by half a head each; a configuration
without the field, as it writes it for a model of its own, is taken to mean that.
"""

from __future__ import annotations

from typing import Any

from megatron_msa.checkpoint.hf.mapping import Rule
from megatron_msa.checkpoint.hf.settings import Settings
from megatron_msa.errors import ConfigError

TENSORS = r"(vision_tower|multi_modal_projector|patch_merge_mlp)\..*"
"""Pattern of the names of all of them."""
SPELLINGS = ((r"\.block_sparse_moe\.fc([12])\.", r".mlp.fc\1."),)
"""transformers 5.17 renames the tower's networks when it saves."""

_OWN = "vision_model"
_OWN_LAYER = f"{_OWN}.encoder.layers.{{layer}}"
_HF = "vision_tower.vision_model"
_HF_LAYER = f"{_HF}.encoder.layers.{{layer}}"
_CONTINUOUS = {
    f"{_OWN}.pre_norm": f"{_HF}.pre_layrnorm",
    f"{_OWN_LAYER}.input_layernorm": f"{_HF_LAYER}.layer_norm1",
    f"{_OWN_LAYER}.pre_mlp_layernorm": f"{_HF_LAYER}.layer_norm2",
    f"{_OWN_LAYER}.self_attention.linear_proj": f"{_HF_LAYER}.self_attn.out_proj",
    f"{_OWN_LAYER}.mlp.linear_fc1": f"{_HF_LAYER}.mlp.fc1",
    f"{_OWN_LAYER}.mlp.linear_fc2": f"{_HF_LAYER}.mlp.fc2",
    f"{_OWN}.projector.linear_fc1": "multi_modal_projector.linear_1",
    f"{_OWN}.projector.linear_fc2": "multi_modal_projector.linear_2",
    f"{_OWN}.merge.linear_fc1": "patch_merge_mlp.linear_1",
    f"{_OWN}.merge.linear_fc2": "patch_merge_mlp.linear_2",
}

RULES = (
    Rule(f"{_OWN}.patch_embedding.weight", (f"{_HF}.embeddings.patch_embedding.weight",), "patch_kernel"),
    *(
        Rule(
            f"{_OWN_LAYER}.self_attention.linear_qkv.{kind}",
            tuple(f"{_HF_LAYER}.self_attn.{name}_proj.{kind}" for name in "qkv"),
            "vision_qkv",
        )
        for kind in ("weight", "bias")
    ),
    *(
        Rule(f"{own}.{kind}", (f"{hf}.{kind}",))
        for own, hf in _CONTINUOUS.items()
        for kind in ("weight", "bias")
    ),
)

_SAME = {
    "num_hidden_layers": "vision_num_layers",
    "hidden_size": "vision_hidden_size",
    "intermediate_size": "vision_ffn_hidden_size",
    "num_attention_heads": "vision_num_attention_heads",
    "num_channels": "vision_num_channels",
    "patch_size": "vision_patch_size",
    "temporal_patch_size": "vision_temporal_patch_size",
    "spatial_merge_size": "vision_merge_size",
    "layer_norm_eps": "vision_layernorm_epsilon",
}


def to_megatron(config: Any) -> Settings:
    """Settings of a multimodal configuration's vision part.

    Raises:
        ConfigError: something that the encoder here does not compute.
    """
    tower = config.vision_config
    if tower.hidden_act != "gelu" or tower.attention_dropout:
        raise ConfigError(
            f"config.json has a vision tower with hidden_act {tower.hidden_act!r} and attention_dropout "
            f"{tower.attention_dropout}; only 'gelu' and 0 convert"
        )
    mode = getattr(tower, "rope_mode", None)
    if mode not in (None, "3d"):
        raise ConfigError(f"config.json has a vision tower with rope_mode {mode!r}; only '3d' converts")
    compression = getattr(tower, "img_token_compression_config", None) or {}
    for name in ("spatial_merge_size", "temporal_patch_size"):
        if compression.get(name, getattr(tower, name)) != getattr(tower, name):
            raise ConfigError(
                f"config.json contradicts itself: {name} of the vision tower is {getattr(tower, name)}, in "
                f"its img_token_compression_config {compression[name]}; correct one of them"
            )
    settings: Settings = {own: getattr(tower, hf) for hf, own in _SAME.items()}
    return settings | {
        "vision_mode": "train",
        "vision_image_token_id": config.image_token_index,
        "vision_video_token_id": config.video_token_index,
        "vision_projector_hidden_size": config.projector_hidden_size,
        "vision_rope_axes": "th" if mode is None else "thw",
        "vision_rope_base": float(tower.rope_parameters["rope_theta"]),
        "vision_segment_frames": getattr(tower, "vision_segment_max_frames", None) or 0,
    }


def to_hf(settings: Settings) -> dict[str, Any]:
    """Fields of the multimodal configuration; none for a text model.

    Raises:
        ConfigError: an encoder that MiniMax-M3 cannot express.
    """
    if settings["vision_mode"] == "none":
        return {}
    if settings["vision_rope_axes"] == "hw":
        raise ConfigError(
            "vision_rope_axes is 'hw': the family turns time, height and width, or time and height"
        )
    tower = {hf: settings[own] for hf, own in _SAME.items()}
    tower |= {
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "axial", "rope_theta": settings["vision_rope_base"]},
        "vision_segment_max_frames": settings["vision_segment_frames"] or None,
        "rope_mode": "3d" if settings["vision_rope_axes"] == "thw" else None,
    }
    fields = {
        "vision_config": tower,
        "image_token_index": settings["vision_image_token_id"],
        "projector_hidden_size": settings["vision_projector_hidden_size"] or settings["hidden_size"],
    }
    if settings["vision_video_token_id"] is not None:
        fields["video_token_index"] = settings["vision_video_token_id"]
    return fields
