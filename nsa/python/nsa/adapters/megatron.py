"""NSA as Megatron-core's core attention.

    spec = get_nsa_layer_spec(get_gpt_layer_local_spec(), nsa.Config(...), **options)

Keys and values are shared by the three branches; compressors and gates (made from the queries) are
parameters of the core attention. What Megatron does, and what becomes of it:

    masks     attn_mask_type must be causal; an attention_mask tensor (Megatron's data loaders make
              none with --no-create-attention-mask-in-dataloader), attention_bias, window_size,
              attention_dropout, softmax_type other than vanilla: error. Documents: thd, below.
    RoPE      applied before, with positions of the zig-zag dealing: nothing to do.
    GQA       num_query_groups key/value heads, not repeated. Tensor parallelism deals whole groups
              (each rank has its heads' parameters); more TP ranks than query groups: error.
    sbhd      [s,b,heads,dim], each sequence one document; one sequence (b = 1) is not copied,
              several are, to transpose them.
    thd       [t,heads,dim] with packed_seq_params: documents of cu_seqlens_q_padded, or else of
              cu_seqlens_q, over all ranks. Padding at a document's end is seen by padding alone, so
              the result is exact. Each new cu_seqlens takes an engine, in the others' memory.
    CP        the tokens as Megatron deals them (2P chunks of each document, rank r holds r and
              2P-1-r), not reordered, over the cp group of pg_collection, or else parallel_state's.
              cp_comm_type other than p2p, hierarchical and hybrid context parallelism: error.
    gradients parameters' are of this rank's tokens; Megatron sums them over data and context
              parallel ranks.
    compile   torch.compile with fullgraph=True traces it as a whole, and compiles nothing anew for
              other documents; without, its graph breaks where documents are read. Where a CUDA
              graph is captured thd is an error, as documents are read.
    inference error, with any inference context.
"""

import copy
import dataclasses

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

from nsa.adapters._shared import Core, Documents, check_heads, check_scale, group_of
from nsa.config import Config

# What a TransformerConfig must say.
_REQUIRED = {
    "attention_dropout": 0.0,
    "window_size": None,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
    "qk_clip": False,
    "log_max_attention_logit": False,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "use_kitchen_attention": False,
    "attention_backend": AttnBackend.auto,
    "batch_invariant_mode": False,
    "flash_decode": False,
    "hierarchical_context_parallel_sizes": None,
    "hybrid_context_parallel": False,
}


def _require(name, value, *allowed):
    if value not in allowed:
        raise ValueError(f"{name} = {value}: with NSA it must be {allowed[0]}")


class NSACoreAttention(MegatronModule):
    """For SelfAttentionSubmodules.core_attention. Parameters: those of nsa.CoreAttention, as
    `core`, of this tensor-parallel rank's heads."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
        *,
        nsa_config: Config,
        **core_options,
    ):
        """nsa_config: of the whole model's heads. core_options: of nsa.CoreAttention, but for
        those that Megatron determines. The others: Megatron's."""
        super().__init__(config=config)
        for name, value in _REQUIRED.items():
            _require(name, getattr(config, name, value), value)
        _require("attention_dropout", attention_dropout or 0.0, 0.0)
        _require("attn_mask_type", attn_mask_type, AttnMaskType.causal)
        _require("attention_type", attention_type, "self")
        _require("cp_comm_type", cp_comm_type, "p2p", None)
        check_heads(
            nsa_config, config.num_attention_heads, config.num_query_groups, config.kv_channels
        )
        check_scale(nsa_config, softmax_scale)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.tp_group = pg_collection.tp
        tp_size = self.tp_group.size()
        if tp_size > 1 and not core_options.get("compressor_per_head", True):
            raise ValueError("compressor_per_head = False: must be True with tensor parallelism")
        self.cp_size = config.context_parallel_size
        if self.cp_size > 1:
            _require("context_parallel_size", self.cp_size, pg_collection.cp.size())
        self.core = Core(
            dataclasses.replace(
                nsa_config,
                num_q_heads=nsa_config.num_q_heads // tp_size,
                num_kv_heads=nsa_config.num_kv_heads // tp_size,
            ),
            group_of(pg_collection.cp) if self.cp_size > 1 else None,
            gate_from_query=True,
            sharding="zigzag_per_document",
            sum_over_ranks=False,
            device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
            dtype=config.params_dtype,
            **core_options,
        )
        for parameter in self.parameters():  # one part of the heads each
            set_tensor_model_parallel_attributes(parameter, tp_size > 1, 0, 1)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ) -> torch.Tensor:
        """query [s,b,Hq,D], key and value [s,b,Hkv,D]: [s,b,Hq*D]; or with packed_seq_params
        [t,Hq,D], [t,Hkv,D]: [t,Hq*D]."""
        _require("attn_mask_type", attn_mask_type, AttnMaskType.causal, None)
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("attention_mask, attention_bias: with NSA they must be None")
        if packed_seq_params is None:
            qkv = (x.transpose(0, 1) for x in (query, key, value))
            return self.core(*qkv).transpose(0, 1).flatten(2)
        packed = packed_seq_params
        _require("packed_seq_params.qkv_format", packed.qkv_format, "thd")
        for name in ("cp_group", "local_cp_size"):
            _require(f"packed_seq_params.{name}", getattr(packed, name, None), None)
        if packed.cu_seqlens_q is None or packed.cu_seqlens_kv is None:
            raise ValueError("packed_seq_params.cu_seqlens_q, cu_seqlens_kv: must be given")
        ends = (
            ends if padded is None else padded
            for ends, padded in (
                (packed.cu_seqlens_q, packed.cu_seqlens_q_padded),
                (packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded),
            )
        )
        return self.core(query, key, value, plan=Documents(list(ends))).flatten(1)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """For distributed checkpoints: every parameter is dealt to the TP ranks by heads."""
        parameters = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            parameters,
            prefix,
            dict.fromkeys(parameters, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class NSASelfAttention(SelfAttention):
    """Refuses inference, where Megatron has attention of its own, which is dense."""

    def __init__(self, config, *arguments, **named):
        super().__init__(config, *arguments, **named)
        if config.num_query_groups < self.world_size:
            raise ValueError(
                f"num_query_groups = {config.num_query_groups}: must not be less than the "
                f"{self.world_size} tensor-parallel ranks, as NSA selects for whole groups"
            )

    def forward(self, hidden_states, attention_mask, **named):
        for name in ("inference_context", "inference_params"):
            _require(name, named.get(name), None)
        return super().forward(hidden_states, attention_mask, **named)


def get_nsa_layer_spec(layer_spec: ModuleSpec, config: Config, **core_options) -> ModuleSpec:
    """A copy of the spec of a TransformerLayer, its self-attention with NSA.

    Args:
        config: of the whole model's heads.
        core_options: of nsa.CoreAttention, such as compressor_hidden or engine_options.
    """
    layer_spec = copy.deepcopy(layer_spec)
    attention = layer_spec.submodules.self_attention
    if attention.module is not SelfAttention:
        raise ValueError(f"layer_spec: self_attention is {attention.module}, not SelfAttention")
    attention.module = NSASelfAttention
    attention.submodules.core_attention = ModuleSpec(
        NSACoreAttention, params={"nsa_config": config, **core_options}
    )
    return layer_spec
