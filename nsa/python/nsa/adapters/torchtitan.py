"""NSA as torchtitan's inner attention.

    spec = llama3.model_registry("8B", converters=[NSAConverter.Config(nsa=nsa.Config(...))])

Keys and values are shared by the three branches; compressors and gates (made from the queries) are
parameters of the inner attention. What torchtitan does, and what becomes of it:

    masks     causal; attention_masks (of the backends flex and varlen, which NSA replaces) and
              varlen's window_size: error.
    documents begin where positions do not go on by one, as torchtitan's data loaders say. Compiled
              blocks are compiled once for all documents. They are read in every step, which CUDA
              graphs do not allow: training.disable_cuda_graphs must be True, unless positions are
              None and each sequence one document.
    RoPE      applied before, by positions.
    GQA       n_kv_heads, not repeated.
    CP        torchtitan's dealing of each sequence as it is: load balancer headtail (zig-zag) or
              none (contiguous), which the positions must agree with; ptrr: error.
              apply_cp_to_forward() makes q, k and v DTensors of the cp mesh, whose group is used;
              nothing is gathered but positions. In batches of several sequences each must be one
              document, dealt by headtail.
    TP        error, as are the SPMD backends spmd_types and full_dtensor (with CP they gather k and
              v): parallelism.spmd_backend must be partial_dtensor.
    MFU       torchtitan counts the operations of dense attention.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor, Shard
from torchtitan.models.common.attention import GQAttention, ScaledDotProductAttention
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module

import nsa
from nsa.adapters._shared import Core, Documents, check_heads, check_scale
from nsa.module import Compressor

_SHARDINGS = {"headtail": "zigzag", None: "contiguous"}


# torchtitan wants all modules to be its own.
class _Compressor(Compressor, Module):
    pass


class _Core(Core, Module):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.compress_k.__class__ = self.compress_v.__class__ = _Compressor


class NSAInnerAttention(ScaledDotProductAttention):
    """A ScaledDotProductAttention, for which torchtitan makes no masks but does context
    parallelism. Parameters: those of nsa.CoreAttention, as `core`."""

    @dataclass(kw_only=True, slots=True)
    class Config(ScaledDotProductAttention.Config):
        nsa: nsa.Config
        core_options: dict = field(default_factory=dict)  # of nsa.CoreAttention
        load_balancer: str | None = "headtail"  # as parallelism.context_parallel_load_balancer

    def __init__(self, config: Config):
        super().__init__(config)
        if config.load_balancer not in _SHARDINGS:
            raise ValueError(
                f"load_balancer = {config.load_balancer!r}: must be 'headtail' or None"
            )
        self.core = _Core(config.nsa, gate_from_query=True, **config.core_options)
        self.core.positions_sharding = _SHARDINGS[config.load_balancer]

    def parallelize(self, parallel_dims) -> None:
        """torchtitan calls it for tensor parallelism and for SPMD backends that gather k and v."""
        raise ValueError(
            "parallelism.spmd_backend must be 'partial_dtensor', without tensor parallelism"
        )

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: torch.Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        is_causal: bool = True,
    ) -> torch.Tensor:
        """attention_masks: the positions [B,L], as NSAGQAttention gives them; None: every sequence
        is one document (not with context parallelism). The others: of ScaledDotProductAttention."""
        check_scale(self.core.config, scale)
        if not is_causal:
            raise ValueError("is_causal = False: with NSA it must be True")
        q, k, v, positions, group_name = q_BLNH, k_BLNH, v_BLNH, attention_masks, ""
        if isinstance(q, DTensor):
            mesh, placements = q.device_mesh, q.placements
            if mesh.ndim != 1 or placements != (Shard(1),):
                raise ValueError(f"q: is a DTensor with {placements}, must have Shard(1) of cp")
            if positions is None:
                raise ValueError("positions: must be given with context parallelism")
            q, k, v = (x.to_local() for x in (q, k, v))
            group_name = mesh.get_group().group_name
        documents = None if positions is None else Documents([positions], group_name)
        return self.core(q, k, v, plan=documents)


class NSAGQAttention(GQAttention):
    """Hands on positions to its inner attention, which finds the documents by them."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        pass

    def forward(self, x_BLD, attention_masks=None, positions=None):
        if attention_masks is not None:
            raise ValueError("attention_masks: must be None; positions say what the documents are")
        return super().forward(x_BLD, positions, positions)


class NSAConverter(ModelConfigConverter):
    """Replaces the attention of all layers."""

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        nsa: nsa.Config
        core_options: dict = field(default_factory=dict)  # of nsa.CoreAttention
        load_balancer: str | None = "headtail"  # as parallelism.context_parallel_load_balancer

    def __init__(self, config: Config):
        self.options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}

    def convert(self, model_config):
        """A copy of a Decoder.Config, such as Llama3Model.Config."""
        config = self.options["nsa"]
        layers = []
        for layer in model_config.layers:
            attention = layer.attention
            if type(attention) is not GQAttention.Config:
                raise ValueError(f"layers: have {type(attention)}, must have GQAttention.Config")
            n_kv_heads = attention.n_kv_heads or attention.n_heads
            head_dim = attention.head_dim or attention.dim // attention.n_heads
            check_heads(config, attention.n_heads, n_kv_heads, head_dim)
            window = getattr(attention.inner_attention, "window_size", (-1, 0))  # varlen's
            if tuple(window) != (-1, 0):
                raise ValueError(f"window_size = {window}: with NSA it must be (-1, 0), causal")
            fields = {f.name: getattr(attention, f.name) for f in dataclasses.fields(attention)}
            fields["inner_attention"] = NSAInnerAttention.Config(**self.options)
            layers.append(dataclasses.replace(layer, attention=NSAGQAttention.Config(**fields)))
        return dataclasses.replace(model_config, layers=layers)
