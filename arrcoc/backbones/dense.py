"""Dense modes: patch tokens read off the last blocks of a transformer that was trained for one embedding an image.

    raw        z
    maskclip   x' + mlp(norm_2(x')),  x' = x + W v                              Zhou et al. 2022, MaskCLIP
    sclip      the same with x' = x + W (A(q, q) + A(k, k))                     Wang et al. 2024, SCLIP, eq. 4
    clearclip  W A(q, q)                                                        Lan et al. 2024, ClearCLIP, eq. 7
    naclip     W softmax(k k^T s + exp(-d^2 / 2 sigma^2)) v                     Hajimiri et al. 2025, NACLIP, eq. 7
    surgery    x_1 + sum_l W_l A_l(v, v)                                        Li et al. 2023, CLIP Surgery, eq. 8
    gem        x_1 + sum_l W_l mean_{s in q, k, v} G_l(s)                       Bousselham et al. 2024, GEM, eq. 3-6

x enters the last block and z leaves it, x_1 enters the first of the last six (all blocks, where there are fewer);
A(s, s) = softmax(s s^T scale) v, heads side by side; W is the output projection with its bias. The methods differ in
which tokens a token listens to: the query-key attention of a CLIP gathers for the class token and mixes the patches up.
Class and register tokens are listened to as in the original blocks, and the image embedding is always that of the
original blocks. Attention is fused: no matrix of it is ever built.

Axes: B images, T tokens inside the tower (P prefix, then N patches), C width, A heads, K width of a head, h and w grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NACLIP_SIGMA = 5.0
"""Standard deviation of naclip's Gaussian, in tokens (the paper's choice for every data set)."""

_SECOND_PATH_BLOCKS = 6
_GEM_ITERATIONS = 1


class Block(ABC):
    """One pre-norm transformer block of a library: x + output(attention(norm_1(x))), then x + mlp(norm_2(x)).

    The parts read the live parameters of ``module``. Subclasses keep no function that closes over it: a deep copy of a
    block belongs to the deep copy of its module.

    Args:
        module: the library's block.
        scale: factor of q k^T before the softmax, K^-1/2 as a rule.
    """

    def __init__(self, module: Any, scale: float) -> None:
        self.module = module
        self.scale = scale

    @abstractmethod
    def norm_1(self, tokens: Tensor) -> Tensor:
        """The norm before attention, [B, T, C] -> [B, T, C]."""

    @abstractmethod
    def qkv(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, A, T, K] as they enter the softmax: with biases, norms and rotations."""

    @abstractmethod
    def output(self, heads: Tensor) -> Tensor:
        """Heads side by side [B, T, A K] -> [B, T, C]: the output projection, with norms and layer scale if any."""

    @abstractmethod
    def norm_2(self, tokens: Tensor) -> Tensor:
        """The norm before the MLP, [B, T, C] -> [B, T, C]."""

    @abstractmethod
    def mlp(self, normed: Tensor) -> Tensor:
        """The MLP's branch, layer scale included, [B, T, C] -> [B, T, C]."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """The block itself, [B, T, C] -> [B, T, C]."""
        return self.attended(tokens, *self.qkv(self.norm_1(tokens)))

    def attended(self, tokens: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The block's output for the first tokens, as many as there are queries; its own q, k, v are known."""
        return self.with_mlp(tokens[:, : q.shape[2]] + self.output(attention(q, k, v, self.scale)))

    def with_mlp(self, tokens: Tensor) -> Tensor:
        """x + mlp(norm_2(x))."""
        return tokens + self.mlp(self.norm_2(tokens))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale + bias) v, fused, with its heads side by side: [B, T, A K]."""
    heads_BATK = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return _side_by_side(heads_BATK)


def _side_by_side(heads_BATK: Tensor) -> Tensor:
    return heads_BATK.transpose(1, 2).flatten(2)


@dataclass(frozen=True, kw_only=True)
class Last:
    """The last blocks of a tower and what enters them.

    Args:
        blocks: those that the mode reads, in order.
        tokens: [B, T, C], input of the first of them.
        num_prefix: class and register tokens before the patches.
        grid: (h, w) of the patches.
        num_pooled: how many of the tower's first tokens the image embedding needs: the prefix, or all of them.
    """

    blocks: Sequence[Block]
    tokens: Tensor
    num_prefix: int
    grid: tuple[int, int]
    num_pooled: int


Read = Callable[[Last], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to read patch tokens.

    Args:
        read: `Last` -> (patches [B, N, C] where the last block's output would be, that output for the first tokens).
        num_blocks: how many of the last blocks it reads; a tower with fewer gives all it has.
        orientation: sign of relevance by pooling ("class token", "average", "attention"), see `Backbone`.
        from_empty_text: queries are read relative to the embedding of the empty text.
    """

    read: Read
    num_blocks: int
    orientation: Mapping[str, int]
    from_empty_text: bool = False


def raw(last: Last) -> tuple[Tensor, Tensor]:
    """The last block's own output."""
    return last.tokens[:, last.num_prefix :], last.tokens


def maskclip(last: Last) -> tuple[Tensor, Tensor]:
    """The last block with the identity for attention: a patch listens to itself alone."""
    (block,), patches = last.blocks, last.tokens[:, last.num_prefix :]
    q, k, v = block.qkv(block.norm_1(last.tokens))
    values = _side_by_side(v[:, :, last.num_prefix :])
    return block.with_mlp(patches + block.output(values)), _pooled(last, q, k, v)


def sclip(last: Last) -> tuple[Tensor, Tensor]:
    """The last block with the sum of query-query and key-key attention; its rows sum to 2, as in the paper."""
    (block,), patches = last.blocks, last.tokens[:, last.num_prefix :]
    q, k, v = block.qkv(block.norm_1(last.tokens))
    heads = attention(q[:, :, last.num_prefix :], q, v, block.scale)
    heads = heads + attention(k[:, :, last.num_prefix :], k, v, block.scale)
    return block.with_mlp(patches + block.output(heads)), _pooled(last, q, k, v)


def clearclip(last: Last) -> tuple[Tensor, Tensor]:
    """Query-query attention of the last block, without residual and MLP."""
    (block,) = last.blocks
    q, k, v = block.qkv(block.norm_1(last.tokens))
    return block.output(attention(q[:, :, last.num_prefix :], q, v, block.scale)), _pooled(last, q, k, v)


def naclip(last: Last) -> tuple[Tensor, Tensor]:
    """Key-key attention of the last block that favours neighbours, without residual and MLP; none for the prefix."""
    (block,) = last.blocks
    q, k, v = block.qkv(block.norm_1(last.tokens))
    bias_NT = F.pad(neighbourhood(last.grid, k), (last.num_prefix, 0))
    return block.output(attention(k[:, :, last.num_prefix :], k, v, block.scale, bias_NT)), _pooled(last, q, k, v)


def neighbourhood(grid: tuple[int, int], like: Tensor) -> Tensor:
    """exp(-d^2 / 2 sigma^2) of the distance d between tokens on the grid: [N, N], in dtype and place of a tensor."""
    wide = torch.promote_types(like.dtype, torch.float32)
    sides = [torch.arange(size, device=like.device, dtype=wide) for size in grid]
    row, column = (torch.exp(-((x[:, None] - x) ** 2) / (2 * NACLIP_SIGMA**2)) for x in sides)
    return torch.kron(row, column).to(like.dtype)


def surgery(last: Last) -> tuple[Tensor, Tensor]:
    """A second path beside the last blocks that gathers their value-value attention and passes no MLP."""
    return _second_path(last, lambda block, normed, q, k, v: attention(v[:, :, last.num_prefix :], v, v, block.scale))


def gem(last: Last) -> tuple[Tensor, Tensor]:
    """A second path that gathers self-self attention of queries, keys and values, each grouped with its like once more.

    G(s) = softmax(tau s' s'^T) v  with  s' = normalise(softmax(tau u u^T) u),  u = normalise(s),  and tau the mean norm
    of the image's tokens after norm_1 times K^-1/2: the temperature adapts to the picture.
    """

    def read(block: Block, normed: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        norms_BT = normed.to(torch.promote_types(normed.dtype, torch.float32)).norm(dim=-1)
        tau = (norms_BT.mean(-1) * q.shape[-1] ** -0.5).to(v.dtype)[:, None, None, None]
        heads = []
        for s in (q, k, v):
            s = F.normalize(s, dim=-1)
            for _ in range(_GEM_ITERATIONS):
                s = F.normalize(F.scaled_dot_product_attention(tau * s, s, s, scale=1.0), dim=-1)
            heads.append(attention(tau * s[:, :, last.num_prefix :], s, v, 1.0))
        return torch.stack(heads).mean(0)

    return _second_path(last, read)


def _second_path(last: Last, read: Callable[[Block, Tensor, Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """x_1 + sum_l W_l heads_l, the heads read from the original path; the last block's output for the pooled tokens."""
    tokens, patches = last.tokens, last.tokens[:, last.num_prefix :]
    for number, block in enumerate(last.blocks, start=1):
        normed = block.norm_1(tokens)
        q, k, v = block.qkv(normed)
        patches = patches + block.output(read(block, normed, q, k, v))
        num_needed = last.num_pooled if number == len(last.blocks) else tokens.shape[1]
        tokens = block.attended(tokens, q[:, :, :num_needed], k, v)
    return patches, tokens


def _pooled(last: Last, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last block's own output for the tokens that the image embedding needs."""
    return last.blocks[0].attended(last.tokens, q[:, :, : last.num_pooled], k, v)


# Raw patches of a class-token tower are more like a text where the picture does not show it ("opposite visualization",
# Li et al. 2023). An average or an attention pool makes the embedding of what the patches hold: there it is upright.
_AS_POOLED = MappingProxyType({"class token": -1, "average": 1, "attention": 1})
_UPRIGHT = MappingProxyType(dict.fromkeys(_AS_POOLED, 1))

MODES: Mapping[str, Mode] = MappingProxyType(
    {
        "raw": Mode(read=raw, num_blocks=0, orientation=_AS_POOLED),
        "maskclip": Mode(read=maskclip, num_blocks=1, orientation=_UPRIGHT),
        "sclip": Mode(read=sclip, num_blocks=1, orientation=_UPRIGHT),
        "clearclip": Mode(read=clearclip, num_blocks=1, orientation=_UPRIGHT),
        "naclip": Mode(read=naclip, num_blocks=1, orientation=_UPRIGHT),
        "surgery": Mode(read=surgery, num_blocks=_SECOND_PATH_BLOCKS, orientation=_UPRIGHT, from_empty_text=True),
        "gem": Mode(read=gem, num_blocks=_SECOND_PATH_BLOCKS, orientation=_UPRIGHT),
    }
)
DEFAULT_MODE: Mapping[str, str] = MappingProxyType({"class token": "clearclip", "average": "raw", "attention": "raw"})
