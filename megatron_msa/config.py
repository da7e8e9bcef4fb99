"""The settings of MiniMax Sparse Attention: one dataclass, from which the `--msa-*` flags are generated.

Paper: arXiv 2606.13392. Field names follow the public Megatron request for MSA where they fit.
"""

import dataclasses
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_msa.errors import ConfigError
from megatron_msa.layer_pattern import parse_layer_pattern
from megatron_msa.phases import PhaseSchedule

LAYOUTS = ("auto", "zigzag", "balanced", "documents")
"""What `--msa-cp-layout` may be; `megatron_msa.attention.context_parallel` says what they mean."""
_BACKENDS = ("auto", "triton", "reference")


@dataclass(kw_only=True)
class MSATransformerConfig(TransformerConfig):
    """MiniMax Sparse Attention: block selection by an index branch, aligned with a KL loss."""

    msa_block_size: int = 128
    """Keys per block (B). Blocks are aligned to the start of each document."""

    msa_num_selected_blocks: int = 16
    """Blocks that each query and GQA group attends to (k), its own block included."""

    msa_indexer_head_dim: int | None = None
    """Head dimension of the index branch. Default: that of the attention heads (--kv-channels)."""

    msa_layer_freq: str = "1"
    """Which layers use MSA; the others keep full attention. An integer N (every N-th layer) or a list
    expression with one 0 or 1 per layer, as in --moe-layer-freq: "([0]*3+[1]*38)"."""

    msa_schedule: str | None = None
    """Training phases with the iteration or token count at which each starts, for example
    "warmup@0,sparse@2000" or "dense@0,warmup@2.6Ttok,sparse@2.64Ttok". Phases: dense (plain GQA), index_only
    (frozen backbone, only the index branch trains), warmup (full attention, KL over all visible tokens),
    sparse. Counts are absolute, so a resumed run continues in the right phase."""

    msa_loss_coeff: float = 1.0
    """Weight (lambda) of the KL alignment loss, summed over MSA layers. It never trains the backbone."""

    msa_indexer_lr: float | None = None
    """Peak learning rate of the index branch; --min-lr is scaled along. Default: --lr. Adam makes the
    index branch insensitive to --msa-loss-coeff, so this is the setting that changes its speed."""

    msa_backend: str = dataclasses.field(
        default="auto", metadata={"argparse_meta": {"choices": list(_BACKENDS)}}
    )
    """Kernels: auto (Triton where it runs, otherwise the PyTorch reference), triton, or reference."""

    msa_quality_interval: int = 100
    """Measure block recall, score recall and the shape of the selection every N iterations; 0 for never."""

    msa_quality_rows: int = 128
    """Query rows per layer and microbatch that the selection quality is measured on."""

    msa_full_width_qk_norm: bool = False
    """With --qk-layernorm: one RMSNorm over all heads of q together and one over all heads of k (as in
    MiniMax-M2) instead of one per head. The index branch keeps a norm per head."""

    msa_cp_layout: str = dataclasses.field(
        default="auto", metadata={"argparse_meta": {"choices": list(LAYOUTS)}}
    )
    """How --context-parallel-size ranks share a sequence: zigzag (two of 2 C chunks each, Megatron's layout),
    balanced (small chunks, dealt by causal area within documents), documents (zigzag of every document by
    itself, padded to 2 C), or auto: balanced for packed documents, zigzag for whole sequences."""

    def __post_init__(self) -> None:
        # Before Megatron's own checks: their messages would name symptoms (a failed division) instead.
        _check_heads(self)
        _check_supported(self)
        super().__post_init__()
        if self.msa_indexer_head_dim is None:
            self.msa_indexer_head_dim = self.kv_channels
        self._check_msa()
        if len(set(self.msa_layer_pattern())) > 1:
            # Megatron saves equal layers as one stacked tensor, but only some of these have an index branch.
            self.hetereogenous_dist_checkpoint = True

    def msa_layer_pattern(self) -> list[int]:
        """One entry per layer: 1 for MSA, 0 for full attention."""
        return parse_layer_pattern(self.msa_layer_freq, self.num_layers, "--msa-layer-freq")

    def phase_schedule(self) -> PhaseSchedule:
        """The parsed `msa_schedule`."""
        return PhaseSchedule.parse(self.msa_schedule)

    def _check_msa(self) -> None:
        if self.msa_num_selected_blocks < 1:
            raise ConfigError(
                f"--msa-num-selected-blocks is {self.msa_num_selected_blocks}; at least 1 is needed, because "
                "the block that holds the query always takes one (the paper uses 16)"
            )
        if self.msa_block_size < 1:
            raise ConfigError(f"--msa-block-size is {self.msa_block_size}; it must be positive (paper: 128)")
        if self.msa_indexer_head_dim is None or self.msa_indexer_head_dim < 1:
            raise ConfigError(f"--msa-indexer-head-dim is {self.msa_indexer_head_dim}; it must be positive")
        if self.msa_loss_coeff < 0:
            raise ConfigError(f"--msa-loss-coeff is {self.msa_loss_coeff}; it must not be negative")
        if self.msa_indexer_lr is not None and self.msa_indexer_lr < 0:
            raise ConfigError(f"--msa-indexer-lr is {self.msa_indexer_lr}; it must not be negative")
        if self.msa_backend not in _BACKENDS:
            raise ConfigError(f"--msa-backend is {self.msa_backend!r}; allowed: {', '.join(_BACKENDS)}")
        if self.msa_quality_interval < 0 or self.msa_quality_rows < 1:
            raise ConfigError(
                f"--msa-quality-interval {self.msa_quality_interval} and --msa-quality-rows "
                f"{self.msa_quality_rows}: the interval must be 0 (never) or more, the rows at least 1"
            )
        if self.msa_cp_layout not in LAYOUTS:
            raise ConfigError(f"--msa-cp-layout is {self.msa_cp_layout!r}; allowed: {', '.join(LAYOUTS)}")
        if self.msa_full_width_qk_norm and (not self.qk_layernorm or self.normalization != "RMSNorm"):
            raise ConfigError(
                "--msa-full-width-qk-norm needs --qk-layernorm and --normalization RMSNorm; add them or "
                "leave it out"
            )
        groups = self.num_query_groups
        if groups is not None and self.tensor_model_parallel_size > groups:
            raise ConfigError(
                f"--tensor-model-parallel-size is {self.tensor_model_parallel_size} but there are {groups} "
                "GQA groups (--num-query-groups); MSA shards its index heads with the groups, so use at most "
                f"{groups}"
            )
        self.msa_layer_pattern()
        self.phase_schedule()


def _check_heads(config: MSATransformerConfig) -> None:
    heads, groups = config.num_attention_heads, config.num_query_groups
    if groups is not None and (groups < 1 or heads % groups):
        raise ConfigError(
            f"--num-attention-heads {heads} is not divisible by --num-query-groups {groups}; every GQA group "
            "needs the same number of query heads"
        )


def _check_supported(config: MSATransformerConfig) -> None:
    """Refuse settings of Megatron that an MSA layer would ignore, which is worse than an error."""
    settings = [
        ("--transformer-impl", config.transformer_impl, ("local", "transformer_engine")),
        ("--attention-dropout", config.attention_dropout, (0.0,)),
        ("--multi-latent-attention", config.multi_latent_attention, (False,)),
        ("--window-size", config.window_size, (None,)),
        ("--softmax-type", config.softmax_type, ("vanilla",)),
        # These two read the largest score of each head, which the ops do not return.
        ("--qk-clip", config.qk_clip, (False,)),
        ("--log-max-attention-logit", config.log_max_attention_logit, (False,)),
        # A captured layer would repeat the phase of the step it was captured in.
        ("--cuda-graph-impl", config.cuda_graph_impl, ("none",)),
    ]
    for flag, value, allowed in settings:
        if value not in allowed:
            names = " or ".join(str(choice) for choice in allowed)
            raise ConfigError(f"{flag} is {value}; MSA layers support only {names}")
    if config.transformer_impl == "local" and config.normalization != "RMSNorm":
        for flag, is_set in (
            ("--apply-layernorm-1p", config.layernorm_zero_centered_gamma),
            ("--sequence-parallel", config.sequence_parallel),
        ):
            if is_set:
                raise ConfigError(
                    f"{flag} needs --normalization RMSNorm with --transformer-impl local, got "
                    f"{config.normalization}"
                )


def msa_field_names() -> list[str]:
    """Names of the fields that MSA adds to Megatron's TransformerConfig."""
    inherited = {field.name for field in dataclasses.fields(TransformerConfig)}
    return [field.name for field in dataclasses.fields(MSATransformerConfig) if field.name not in inherited]
