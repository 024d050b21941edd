"""CLIP's text tower without its padding, for training: captions are short, and most of a text batch is padding.

    if packs(model): text_BE = encode_text(model, text_BL)       # model.encode_text to rounding, gradients too

Positions behind the end-of-text token cannot influence the text feature (causal attention, pooled at that token). Here
they are left out of everything but attention, which sees captions padded to the longest of the batch. MoE layers get
the packed tokens [T, D], as they would have made them themselves (`upcycle_bench.padding`).

Shape suffixes: B captions, L the longest, P = B * L, T tokens without padding, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.padding import Padding


def packs(model: Any) -> bool:
    """Whether `encode_text` knows that model's text tower: causal, pooled at the end of text, plain blocks."""
    blocks = getattr(getattr(model, "transformer", None), "resblocks", [])
    return Padding.of(model) is not None and all(
        isinstance(block.attn, nn.MultiheadAttention) and block.attn.in_proj_bias is not None for block in blocks
    )


def encode_text(model: Any, text_BL: Tensor) -> Tensor:
    """Text features [B, E], not normalised: what `model.encode_text(text_BL)` gives, to rounding."""
    padding = Padding.of(model)
    assert padding is not None
    end_B = padding.end_positions(text_BL)
    text_BL = text_BL[:, : int(end_B.max()) + 1]
    padding.observe(model, (text_BL,))
    keep_T = padding.keep_T
    assert keep_T is not None
    rows, longest = text_BL.shape
    # not by the embedding module's own forward: its hooks expect whole captions
    x_TD = F.embedding(text_BL.flatten()[keep_T], model.token_embedding.weight)
    x_TD = x_TD + model.positional_embedding[keep_T % longest]
    for block in model.transformer.resblocks:
        x_TD = x_TD + block.ls_1(_attention(block.attn, block.ln_1(x_TD), padding, rows, longest))
        x_TD = x_TD + block.ls_2(block.mlp(block.ln_2(x_TD)))
    last_B = torch.cumsum(end_B + 1, 0) - 1
    x_BD = model.ln_final(x_TD.index_select(0, last_B))
    if model.text_projection is None:
        return x_BD
    return model.text_projection(x_BD) if isinstance(model.text_projection, nn.Linear) else x_BD @ model.text_projection


def _attention(attention: nn.MultiheadAttention, x_TD: Tensor, padding: Padding, rows: int, longest: int) -> Tensor:
    """Causal self-attention; only queries, keys and values are padded."""
    qkv_T = F.linear(x_TD, attention.in_proj_weight, attention.in_proj_bias)
    qkv_BL = padding.expand(qkv_T).view(rows, longest, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv_BL.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attention.out_proj(padding.compact(mixed.transpose(1, 2).reshape(rows * longest, -1)))
