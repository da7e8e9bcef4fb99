"""How many parameters a model has, by arithmetic on its configuration: no model is built.

Two numbers, for a GPTModel with rotary embeddings:

- total: everything that is stored and trained. Tied embeddings count once.
- active: what one token is multiplied by in a training step. Of the routed experts only the top-k count.
  Of the vocabulary matrices only the output projection counts (the shared matrix if embeddings are tied),
  because reading one row of an input embedding table multiplies nothing. MTP layers count, with the top-k
  of their experts. The vision encoder and its projector do not: no token of text goes through them.

This convention reproduces the sizes that the paper gives for its pilot model, 10.53B total and 1.47B active
(arXiv 2606.13392; 16 layers, hidden 2048, 64 experts of 1536 and one shared, top-4, vocabulary 200,000), for
its GQA form with tied embeddings: 10.528B and 1.469B. The 16 index branches add 0.021B to both (10.55B and
1.49B), and untied embeddings add 0.41B to the total alone. Counting the input table of an untied model as
active too would give 1.88B.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from megatron_msa.errors import ConfigError
from megatron_msa.layer_pattern import parse_layer_pattern
from megatron_msa.model.vision.flops import encoder_parameters, projector_parameters

if TYPE_CHECKING:
    from megatron_msa.config import MSATransformerConfig
    from megatron_msa.model.vision.config import VisionConfig

PARTS = (
    "embedding",
    "output",
    "attention",
    "index_branch",
    "dense_mlp",
    "routed_experts",
    "shared_experts",
    "router",
    "norms",
    "mtp",
    "vision_encoder",
    "vision_projector",
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model; see the module's text for what "active" means.

    Attributes:
        total: the sum of ``by_part``.
        active: the sum of ``active_by_part``.
        by_part: part -> parameters, in the order of `PARTS`. "norms" holds the layer norms, the final norm
            and the gains of q and k; the gains of the index branch are in "index_branch"; "mtp" holds
            whole MTP layers.
        active_by_part: the same keys.
    """

    total: int
    active: int
    by_part: dict[str, int]
    active_by_part: dict[str, int]

    def describe(self) -> str:
        """A table of the parts that the model has; the columns are whole model and active per token."""
        lines = [f"{'part':<16}{'parameters':>20}{'active per token':>22}"]
        for part, count in self.by_part.items():
            if count:
                lines.append(f"{part:<16}{count:>20,}{self.active_by_part[part]:>22,}")
        lines.append(f"{'total':<16}{self.total:>20,}{self.active:>22,}")
        lines.append(f"{'':<16}{_short(self.total):>20}{_short(self.active):>22}")
        return "\n".join(lines)


class LayerKind(NamedTuple):
    """What a transformer layer is made of."""

    is_moe: bool
    is_msa: bool


def count_parameters(
    config: MSATransformerConfig,
    *,
    padded_vocab_size: int,
    untied_embeddings: bool,
    vision: VisionConfig | None = None,
) -> ParameterCount:
    """Count the parameters of Megatron's GPTModel with MSA layers.

    Args:
        config: Megatron's TransformerConfig with the msa_* fields.
        padded_vocab_size: rows of the embedding table, padding included.
        untied_embeddings: whether the output projection has a matrix of its own.
        vision: the encoder of a multimodal model.

    Raises:
        ConfigError: the model has parts that are not counted here (latent attention, latent experts, ...).
    """
    check_countable(config)
    vocabulary = padded_vocab_size * config.hidden_size
    total = Counter({"embedding": vocabulary, "output": vocabulary if untied_embeddings else 0})
    active = Counter({"embedding": 0 if untied_embeddings else vocabulary, "output": total["output"]})
    for counts, experts in ((total, config.num_moe_experts), (active, config.moe_router_topk)):
        for kind in layer_kinds(config):
            counts.update(_layer_parameters(config, kind, num_experts=experts))
        counts["norms"] += _norm_parameters(config, config.hidden_size)  # the final norm
        counts["mtp"] = _stored_mtp_layers(config) * _mtp_layer_parameters(config, num_experts=experts)
    if vision is not None:
        total["vision_encoder"] = encoder_parameters(vision)
        total["vision_projector"] = projector_parameters(vision, config.hidden_size)
    return ParameterCount(
        total=total.total(),
        active=active.total(),
        by_part={part: total[part] for part in PARTS},
        active_by_part={part: active[part] for part in PARTS},
    )


def check_countable(config: MSATransformerConfig) -> None:
    """Refuse configurations whose parameters and FLOPs would be counted wrongly.

    Raises:
        ConfigError: names the setting.
    """
    for name, plain in (
        ("multi_latent_attention", False),
        ("experimental_attention_variant", None),
        ("heterogeneous_block_specs", False),
        ("moe_latent_size", None),
    ):
        value = getattr(config, name, plain)
        if value != plain:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {value!r}; parameters and FLOPs can be counted only for "
                f"grouped-query attention with dense or mixture-of-experts layers. Leave it at {plain}"
            )


def layer_kinds(config: MSATransformerConfig) -> list[LayerKind]:
    """One entry per decoder layer. MTP layers are built like the last decoder layer."""
    is_moe = [0] * config.num_layers
    if config.num_moe_experts is not None:
        is_moe = parse_layer_pattern(config.moe_layer_freq, config.num_layers, "--moe-layer-freq")
    return [LayerKind(bool(m), bool(s)) for m, s in zip(is_moe, config.msa_layer_pattern(), strict=True)]


def attention_matrix_size(config: MSATransformerConfig) -> int:
    """Elements of a layer's QKV projection (with the output gate, if any) and output projection."""
    return config.hidden_size * (_qkv_width(config) + _query_width(config))


def index_matrix_size(config: MSATransformerConfig) -> int:
    """Elements of an MSA layer's index projections: [hidden, groups * d_i] and [hidden, d_i]."""
    return config.hidden_size * (_num_groups(config) + 1) * index_head_dim(config)


def mlp_matrix_size(config: MSATransformerConfig, ffn_hidden_size: int) -> int:
    """Elements of the two matrices of an MLP or expert; a gated one has twice the first."""
    return config.hidden_size * ffn_hidden_size * (3 if config.gated_linear_unit else 2)


def expert_ffn_size(config: MSATransformerConfig) -> int:
    """FFN width of a routed expert."""
    return config.moe_ffn_hidden_size or config.ffn_hidden_size


def router_matrix_size(config: MSATransformerConfig) -> int:
    """Elements of the router of a MoE layer (its expert bias is a buffer)."""
    return config.hidden_size * config.num_moe_experts


def shared_expert_matrix_size(config: MSATransformerConfig) -> int:
    """Elements of the shared experts of a MoE layer, and of their gate; 0 without shared experts."""
    if not config.moe_shared_expert_intermediate_size:
        return 0
    gate = config.hidden_size if getattr(config, "moe_shared_expert_gate", False) else 0
    return mlp_matrix_size(config, config.moe_shared_expert_intermediate_size) + gate


def mtp_projection_size(config: MSATransformerConfig) -> int:
    """Elements of the projection that an MTP layer applies to [embedding, hidden state]."""
    return 2 * config.hidden_size**2


def index_head_dim(config: MSATransformerConfig) -> int:
    """d_i, which defaults to the head dimension."""
    return config.msa_indexer_head_dim or config.kv_channels


def _layer_parameters(
    config: MSATransformerConfig, kind: LayerKind, *, num_experts: int | None
) -> Counter[str]:
    """Parameters of one layer by part, of which ``num_experts`` routed experts are counted."""
    hidden = config.hidden_size
    counts = Counter(attention=attention_matrix_size(config), norms=2 * _norm_parameters(config, hidden))
    if config.add_bias_linear or config.add_qkv_bias:
        counts["attention"] += _qkv_width(config)
    if config.add_bias_linear:
        counts["attention"] += hidden
    if config.qk_layernorm and config.msa_full_width_qk_norm:
        for heads in (config.num_attention_heads, config.num_query_groups):
            counts["norms"] += _norm_parameters(config, heads * config.kv_channels)
    elif config.qk_layernorm:
        counts["norms"] += 2 * _norm_parameters(config, config.kv_channels)
    if kind.is_msa:
        counts["index_branch"] = index_matrix_size(config)
        if config.qk_layernorm:
            counts["index_branch"] += 2 * _norm_parameters(config, index_head_dim(config))
    if kind.is_moe:
        assert num_experts is not None
        counts["routed_experts"] = num_experts * _mlp_parameters(config, expert_ffn_size(config))
        counts["shared_experts"] = shared_expert_matrix_size(config)  # Megatron refuses biases there
        counts["router"] = router_matrix_size(config)
        if config.add_bias_linear:
            counts["router"] += config.num_moe_experts
    else:
        counts["dense_mlp"] = _mlp_parameters(config, config.ffn_hidden_size)
    return counts


def _mtp_layer_parameters(config: MSATransformerConfig, *, num_experts: int | None) -> int:
    """A projection, three norms (of the embedding, of the hidden state, final) and a transformer layer."""
    layer = _layer_parameters(config, layer_kinds(config)[-1], num_experts=num_experts)
    return mtp_projection_size(config) + 3 * _norm_parameters(config, config.hidden_size) + layer.total()


def _stored_mtp_layers(config: MSATransformerConfig) -> int:
    depth = getattr(config, "mtp_num_layers", None) or 0
    # One layer applied at every depth.
    return min(depth, 1) if getattr(config, "mtp_use_repeated_layer", False) else depth


def _mlp_parameters(config: MSATransformerConfig, ffn_hidden_size: int) -> int:
    bias = ffn_hidden_size * (2 if config.gated_linear_unit else 1) + config.hidden_size
    return mlp_matrix_size(config, ffn_hidden_size) + (bias if config.add_bias_linear else 0)


def _norm_parameters(config: MSATransformerConfig, size: int) -> int:
    """RMSNorm has a gain, LayerNorm also a bias."""
    return size if config.normalization == "RMSNorm" else 2 * size


def _num_groups(config: MSATransformerConfig) -> int:
    return config.num_query_groups or config.num_attention_heads


def _query_width(config: MSATransformerConfig) -> int:
    return config.num_attention_heads * config.kv_channels


def _qkv_width(config: MSATransformerConfig) -> int:
    gate = _query_width(config) if getattr(config, "attention_output_gate", False) else 0
    return _query_width(config) + gate + 2 * _num_groups(config) * config.kv_channels


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
