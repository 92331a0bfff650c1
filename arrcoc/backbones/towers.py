"""Image towers of any library, seen one way.

A `Tower` turns pixels into patch tokens and an image embedding. A `TransformerTower` is a tower of `Block`s: what differs
between libraries (names, layouts, position embeddings) ends here, and the dense modes are written once, on blocks.

Axes: B images, T tokens inside the tower (prefix, then patches), N patches, C width, D joint width, A heads, K width of a
head, H and W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]


class Tower(ABC):
    """An image tower read token by token, in one mode.

    Attributes:
        stride: (height, width) of a token in pixels.
        native_grid: (height, width) in tokens at the size of training.
        mode: the dense mode that tokens are read in.
        orientation, normalize_patches: as in `Backbone`, for this tower and mode.
        num_blocks: parts that can be trained, counted from the end (transformer blocks, stages of a convolution).
    """

    stride: tuple[int, int]
    native_grid: tuple[int, int]
    mode: str
    orientation: int
    normalize_patches: bool
    num_blocks: int

    @abstractmethod
    def features(self, pixels: Tensor, num_last: int = 0) -> Tensor:
        """What enters the last ``num_last`` blocks, or the earlier ones that the mode changes, for pixels [B, 3, H, W]."""

    @abstractmethod
    def finish(self, features: Tensor, grid: tuple[int, int], num_last: int = 0) -> tuple[Tensor, Tensor]:
        """Patch tokens [B, N, D], row-major, and image embedding [B, D] from `features` of the same ``num_last``."""

    @abstractmethod
    def last_parameters(self, num_last: int) -> list[nn.Parameter]:
        """Parameters of the last blocks and of all that follows them: what fine-tuning trains."""

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens [B, N, D] and image embedding [B, D] of normalised pixels [B, 3, H, W]."""
        grid = (pixels.shape[-2] // self.stride[0], pixels.shape[-1] // self.stride[1])
        return self.finish(self.features(pixels), grid)


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One pre-norm transformer block:  x + output(attention(norm_1(x))), then  x + mlp(norm_2(x)).

    Args:
        run: the library's own block, x [B, T, C] -> [B, T, C].
        norm_1, norm_2: the two layer norms.
        qkv: normed tokens [B, T, C] -> queries, keys and values, each [B, A, T, K], biases and norms of q and k included.
        output: heads side by side [B, T, A K] -> [B, T, C]: the output projection, and layer scale if there is one.
        mlp: normed tokens -> the branch's output, layer scale included.
        scale: factor of q k^T before the softmax, K^-1/2 as a rule.
    """

    run: Map
    norm_1: Map
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    output: Map
    norm_2: Map
    mlp: Map
    scale: float


class TransformerTower(Tower):
    """A tower of blocks between an embedding and a projection; the parts are a library's, the reading is ours.

    Attributes:
        num_prefix: class and register tokens before the patches.
        pooling: how the image embedding is made: "class token", "average" or "attention".
        blocks: in order.
    """

    num_prefix: int
    pooling: str
    blocks: Sequence[Block]

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """What enters the first block, [B, T, C]; position embeddings are resampled to the grid of the pixels."""

    @abstractmethod
    def project(self, patches: Tensor) -> Tensor:
        """Joint-space tokens [B, N, D] of patches [B, N, C] as a last block gives them: final norm and projection.

        A tower with a pooling head runs that head on each patch alone: attention over one key is its value, so this is
        the head's value path and what follows it.
        """

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """Image embedding [B, D] of the last block's output [B, T, C]."""
