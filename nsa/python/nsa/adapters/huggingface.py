"""NSA in Hugging Face models whose attention is an AttentionInterface: attention "nsa", and the
mask interface of that name.

    model = AutoModelForCausalLM.from_config(config)   # or from_pretrained()
    attach(model, nsa.Config(...), **options)

Keys and values are shared by the three branches; compressors and gates (made from the queries) are
parameters of a module `nsa` in each attention module, and so in the state dict. (from_pretrained()
does not know them: attach first, then load_state_dict().) What the models do, and what becomes of
it:

    masks     causal. attention_mask [B,S] may pad on the right: padding is seen by padding alone,
              so the result of other tokens is exact, and that of padding means nothing. Padding on
              the left, other masks, sliding windows and chunks, softcap, sinks (s_aux), dropout,
              output_attentions, and any argument that is not known here: error.
    documents begin where position_ids do not go on by one, or as cu_seq_lens_q says, as with flash
              attention. In a model that does not hand position_ids on to its attention several are
              an error, but count as one where it makes a KV cache (use_cache), as in its own
              attention.
    RoPE      applied before, by position_ids.
    GQA       num_key_value_heads, not repeated.
    CP        Transformers deals nothing: the caller gives each rank of `process_group` its tokens,
              as nsa.Plan(S, P, sharding="zigzag").shard() does, and their position_ids, by which
              the dealing is checked, and labels as shift_labels.
    compile   torch.compile with fullgraph=True traces it as a whole, and compiles nothing anew for
              other documents; without, its graph breaks where documents are read, and where an
              attention_mask is checked (with torch 2.11 also the mask of position_ids, which models
              make without a KV cache). Where a CUDA graph is captured: error, as position_ids
              (which models make if they are not given) are read.
    decoding  generate(use_cache=False) computes everything anew for each token. A step with a KV
              cache: error.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from nsa.adapters._shared import Core, Documents, check_heads, check_scale, group_of
from nsa.config import Config

# Arguments of an attention that say nothing about its result.
_NO_MATTER = {
    "max_length_q", "max_length_k", "use_cache", "cache_position", "num_items_in_batch", "seq_idx",
    "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "shift_labels",
}  # fmt: skip
# Of transformers.masking_utils: what makes the mask functions of packed documents. A mask function
# is known by the function that made it: to read its S x S values would take too long.
_PACKING = {"and_masks", "packed_sequence_mask_function", "remap_positions_for_packed_sequence"}


def _is_causal_in_documents(mask_function) -> bool:
    if mask_function is causal_mask_function:
        return True
    if mask_function.__qualname__.partition(".")[0] not in _PACKING:
        return False
    parts = []
    for cell in mask_function.__closure__:
        part = cell.cell_contents
        parts += part if isinstance(part, tuple) else [part]
    return all(_is_causal_in_documents(part) for part in parts if callable(part))


def _check_length(q_length, kv_length):
    if q_length != kv_length:
        raise ValueError(
            f"{q_length} queries, {kv_length} keys: NSA does not decode with a KV cache here; use "
            "generate(use_cache=False)"
        )


def nsa_mask(
    *, q_length, kv_length, mask_function, attention_mask=None, batch_size=1, device=None, **_
) -> torch.Tensor | None:
    """For AttentionMaskInterface: ValueError unless the mask is one that NSA has. None where each
    sequence is one document, else a tensor [B,1,1,1] that asks nsa_attention() for position_ids,
    which not every model hands on to its attention."""
    _check_length(q_length, kv_length)
    if not _is_causal_in_documents(mask_function):
        raise ValueError("mask: with NSA it must be causal, in one or several documents")
    if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError("attention_mask: with NSA it may pad sequences on the right only")
    if mask_function is causal_mask_function:
        return None
    return torch.ones(batch_size, 1, 1, 1, dtype=torch.bool, device=device)


def _documents(group_name, position_ids, cu_seq_lens_q, cu_seq_lens_k):
    if cu_seq_lens_q is not None:
        if group_name:
            raise ValueError("cu_seq_lens_q: with context parallelism position_ids say it")
        return Documents([cu_seq_lens_q] + ([] if cu_seq_lens_k is None else [cu_seq_lens_k]))
    if position_ids is not None:
        return Documents([position_ids], group_name)
    if group_name:
        raise ValueError("position_ids: must be given with context parallelism")
    return None


def nsa_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **others,
):
    """For AttentionInterface. query [B,Hq,S,D], key and value [B,Hkv,S,D]: ([B,S,Hq,D], None)."""
    core = getattr(module, "nsa", None)
    if core is None:
        raise ValueError(f"{type(module).__name__}: has no NSA; call attach() of this adapter")
    documents = _documents(core.group_name, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.shape[2:] == (1, 1):
        if documents is None:
            raise ValueError(
                f"position_ids: with NSA they must be those of one document, as the model does not "
                f"hand them on to its {type(module).__name__}"
            )
        attention_mask = None
    others = {name: it for name, it in others.items() if name not in _NO_MATTER}
    others |= {"attention_mask": attention_mask, "dropout": dropout}
    others["is_causal = False"] = is_causal is False
    for name, argument in others.items():
        if isinstance(argument, torch.Tensor) or argument:
            raise ValueError(f"{name}: cannot be honoured with NSA")
    check_scale(core.config, scaling)
    _check_length(query.shape[2], key.shape[2])
    return core(*(x.transpose(1, 2) for x in (query, key, value)), plan=documents), None


AttentionInterface.register("nsa", nsa_attention)
AttentionMaskInterface.register("nsa", nsa_mask)


def attach(model: PreTrainedModel, config: Config, process_group=None, **core_options) -> None:
    """Gives every attention of a decoder its parameters, and the model the attention "nsa".

    Args:
        process_group: the torch ProcessGroup of the context-parallel ranks; None: this rank alone.
        core_options: of nsa.CoreAttention.
    """
    attentions = [
        module
        for module in model.modules()
        if hasattr(module, "is_causal") and hasattr(module, "layer_idx")
    ]
    if not attentions:
        raise ValueError(f"{type(model).__name__}: has no attention with is_causal and layer_idx")
    text = model.config.get_text_config()
    q_heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", q_heads)
    for module in attentions:
        check_heads(config, q_heads, kv_heads, getattr(module, "head_dim", None))
        if not module.is_causal:
            raise ValueError(f"{type(module).__name__}: is_causal must be True")
    model.set_attn_implementation("nsa")
    for module in attentions:
        if getattr(module, "config", model.config)._attn_implementation != "nsa":
            raise ValueError(f"{type(module).__name__}: has no AttentionInterface")
    group = None if process_group is None else group_of(process_group)
    for module in attentions:
        like = next(module.parameters())
        module.nsa = Core(
            config,
            group,
            gate_from_query=True,
            device=like.device,
            dtype=like.dtype,
            **core_options,
        )
        module.nsa.group_name = process_group.group_name if process_group else ""
