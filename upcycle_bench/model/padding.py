"""CLIP's text padding, which is left out of the text tower: what stands behind the end-of-text token.

    text_BC = text_encoder(model)(text_BL)        # model.encode_text(text_BL) to rounding, gradients too

Captions are short, and most of a text batch is padding. It cannot influence the text feature: attention is causal, and
the feature is pooled at the end-of-text token. In an MoE layer it would take up capacity, so `Padding` leaves it out
before the gate. `encode_text` leaves it out of the whole tower but attention, which sees captions padded to the longest
of the batch.

Shape suffixes: P = B * L positions; T tokens, padding left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.model.towers import text_pooling, text_tower
from upcycle_bench.util.plain import plain


class Padding:
    """Which positions of a text batch carry a token: noted by a hook of the token embedding, used by MoE layers."""

    def __init__(self, end_of_text: int | None = None) -> None:
        self.end_of_text = end_of_text  # None: the highest id of a text, as with CLIP's tokenizer
        self.keep_T: Tensor | None = None  # the position of each token
        self.positions = 0  # P

    @classmethod
    def of(cls, model: Any) -> Padding | None:
        """For that CLIP; None if it pools elsewhere or attends to later positions, where padding has a meaning."""
        pool, eos = text_pooling(model)
        if pool not in ("argmax", "eos") or text_tower(model).attn_mask is None:
            return None
        return cls(eos if pool == "eos" else None)

    def end_positions(self, text_BL: Tensor) -> Tensor:
        """Where each caption ends, [B]."""
        marks_BL = text_BL if self.end_of_text is None else (text_BL == self.end_of_text).int()
        return marks_BL.argmax(1)

    def observe(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Note a batch. It is a forward pre-hook of the token embedding: args[0] is text_BL."""
        text_BL = args[0]
        end_B = self.end_positions(text_BL)
        keep_P = (torch.arange(text_BL.shape[1], device=text_BL.device) <= end_B[:, None]).flatten()
        self.keep_T = keep_P.nonzero().squeeze(1)
        self.positions = len(keep_P)

    def compact(self, x_PD: Tensor) -> Tensor:
        """[P, D] -> [T, D], the rows that carry a token."""
        assert self.keep_T is not None, "the token embedding was not called"
        return x_PD.index_select(0, self.keep_T)

    def expand(self, y_TD: Tensor) -> Tensor:
        """[T, D] -> [P, D], the inverse of `compact`, with zeros at padding."""
        assert self.keep_T is not None, "the token embedding was not called"
        return y_TD.new_zeros(self.positions, y_TD.shape[1]).index_copy(0, self.keep_T, y_TD)


def text_encoder(model: Any) -> Callable[[Tensor], Tensor]:
    """What encodes texts [B, L] to features [B, C]: `encode_text` below for a model that it knows, else the model's."""
    return partial(encode_text, model) if packs(model) and not plain() else model.encode_text


def packs(model: Any) -> bool:
    """Whether `encode_text` knows that model's text tower: causal, pooled at end-of-text, PyTorch's attention."""
    tower = text_tower(model)
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", [])
    return Padding.of(model) is not None and all(
        isinstance(block.attn, nn.MultiheadAttention) and block.attn.in_proj_bias is not None for block in blocks
    )


def encode_text(model: Any, text_BL: Tensor) -> Tensor:
    """Text features [B, C], not normalised: what `model.encode_text(text_BL)` gives, to rounding."""
    padding, tower = Padding.of(model), text_tower(model)
    assert padding is not None
    end_B = padding.end_positions(text_BL)
    text_BL = text_BL[:, : int(end_B.max()) + 1]
    padding.observe(model, (text_BL,))
    keep_T = padding.keep_T
    assert keep_T is not None
    rows, longest = text_BL.shape
    # Not by the embedding module's forward: `Padding.observe`, its hook, expects whole captions.
    x_TD = F.embedding(text_BL.flatten()[keep_T], tower.token_embedding.weight)
    # Not by indexing: its backward pass adds rows up in an order that several threads leave to chance.
    x_TD = x_TD + F.embedding(keep_T % longest, tower.positional_embedding)
    for block in tower.transformer.resblocks:
        x_TD = x_TD + block.ls_1(_attention(block.attn, block.ln_1(x_TD), padding, rows, longest))
        x_TD = x_TD + block.ls_2(block.mlp(block.ln_2(x_TD)))
    last_B = torch.cumsum(end_B + 1, 0) - 1
    x_BD = tower.ln_final(x_TD.index_select(0, last_B))
    projection = tower.text_projection
    if projection is None:
        return x_BD
    return projection(x_BD) if isinstance(projection, nn.Linear) else x_BD @ projection


def _attention(attention: nn.MultiheadAttention, x_TD: Tensor, padding: Padding, rows: int, longest: int) -> Tensor:
    """Causal self-attention, [T, D] -> [T, D]; queries, keys and values alone are padded."""
    qkv_T = F.linear(x_TD, attention.in_proj_weight, attention.in_proj_bias)  # [T, 3 D]
    qkv_BL = padding.expand(qkv_T).view(rows, longest, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv_BL.permute(2, 0, 3, 1, 4)  # each [B, heads, L, D / heads]
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attention.out_proj(padding.compact(mixed.transpose(1, 2).reshape(rows * longest, -1)))
