"""Image towers of any library, seen one way.

A `Tower` turns pixels into patch tokens and an image embedding, in two steps so that its last blocks can be trained. A
`TransformerTower` is a tower of `Block`s: what differs between libraries (names, layouts, position embeddings) ends
here, and the dense modes are written once, on blocks.

Axes: B images, T tokens inside the tower (prefix, then patches), N patches, C width, D joint width, H and W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from arrcoc.backbones.dense import DEFAULT_MODE, MODES, Block, Last


class Tower(ABC):
    """An image tower read token by token, in one mode.

    Towers keep modules, never functions closed over them: so a deep copy of a tower belongs to that of its modules.

    Attributes:
        stride: (height, width) of a token in pixels.
        native_grid: (height, width) in tokens at the size of training.
        modes: those it offers, by name.
        mode: the dense mode that tokens are read in.
        orientation, normalize_patches: as in `Backbone`, for this tower and mode.
        num_blocks: parts that can be trained, counted from the end (transformer blocks, stages of a convolution).
    """

    stride: tuple[int, int]
    native_grid: tuple[int, int]
    modes: tuple[str, ...]
    mode: str
    orientation: int
    normalize_patches: bool
    num_blocks: int

    @abstractmethod
    def features(self, pixels: Tensor, num_last: int = 0) -> Tensor:
        """What enters the last ``num_last`` blocks, or earlier ones if the mode reads them, for pixels [B, 3, H, W]."""

    @abstractmethod
    def finish(self, features: Tensor, grid: tuple[int, int], num_last: int = 0) -> tuple[Tensor, Tensor]:
        """Patch tokens [B, N, D], row-major, and image embedding [B, D] from `features` of the same ``num_last``."""

    @abstractmethod
    def last_parameters(self, num_last: int) -> list[nn.Parameter]:
        """Parameters of the last blocks and of all that follows them: what fine-tuning trains.

        Raises:
            ValueError: if the tower has fewer blocks, or cannot be run in parts.
        """

    def grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """(height, width) in tokens of pixels [B, 3, H, W]."""
        return (pixels.shape[-2] // self.stride[0], pixels.shape[-1] // self.stride[1])

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens [B, N, D] and image embedding [B, D] of normalised pixels [B, 3, H, W]."""
        return self.finish(self.features(pixels), self.grid_of(pixels))

    def _choose(self, mode: str | None, default: str) -> str:
        """The mode by name, the default for None.

        Raises:
            ValueError: if this tower does not offer it.
        """
        if mode is not None and mode not in self.modes:
            raise ValueError(f"mode must be one of {self.modes} or None, got {mode!r}.")
        return mode or default

    def _check_num_last(self, num_last: int) -> None:
        if not 0 <= num_last <= self.num_blocks:
            raise ValueError(f"num_last must be in 0..{self.num_blocks}, the blocks of this tower, got {num_last!r}.")


class TransformerTower(Tower):
    """A tower of blocks between an embedding and a projection; the parts are a library's, the reading is ours.

    A subclass sets the attributes below and those of `Tower` that depend on the library (stride, native_grid), and ends
    its ``__init__`` with ``self.read_in(mode)``, which sets the rest.

    Attributes:
        num_prefix: class and register tokens before the patches; a class token is the first.
        pooling: how the image embedding is made: "class token", "average" or "attention".
        mean_is_embedding: True if the plain mean of raw tokens is the image embedding (a norm, then the average).
        blocks: in order.
    """

    num_prefix: int
    pooling: str
    mean_is_embedding: bool = False
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
        """Image embedding [B, D] of the last block's output [B, T, C]; a class-token pool may get the prefix alone."""

    @abstractmethod
    def tail(self) -> Sequence[nn.Module | nn.Parameter]:
        """What follows the last block (norm, pooling head, projection): modules, and parameters as they are now."""

    def blocks_at(self, grid: tuple[int, int]) -> Sequence[Block]:
        """The blocks for pictures of a grid; a tower that rotates queries and keys by position overrides this."""
        return self.blocks

    def read_in(self, mode: str | None) -> None:
        """Choose the mode and what follows from it; None for the default of the pooling.

        Raises:
            ValueError: if mode is unknown.
        """
        self.modes = tuple(MODES)
        self.mode = self._choose(mode, DEFAULT_MODE[self.pooling])
        self.orientation = MODES[self.mode].orientation[self.pooling]
        self.normalize_patches = not (self.mode == "raw" and self.mean_is_embedding)
        self.num_blocks = len(self.blocks)

    def features(self, pixels: Tensor, num_last: int = 0) -> Tensor:
        tokens = self.embed(pixels)
        for block in self._split(self.grid_of(pixels), num_last)[0]:
            tokens = block(tokens)
        return tokens

    def finish(self, features: Tensor, grid: tuple[int, int], num_last: int = 0) -> tuple[Tensor, Tensor]:
        _, own, read = self._split(grid, num_last)
        tokens = features
        for block in own:
            tokens = block(tokens)
        num_pooled = self.num_prefix if self.pooling == "class token" else tokens.shape[1]
        last = Last(blocks=read, tokens=tokens, num_prefix=self.num_prefix, grid=grid, num_pooled=num_pooled)
        patches, pooled = MODES[self.mode].read(last)
        return self.project(patches), self.pool(pooled)

    def last_parameters(self, num_last: int) -> list[nn.Parameter]:
        self._check_num_last(num_last)
        modules = [block.module for block in self.blocks[self.num_blocks - num_last :]]
        parts = [[part] if isinstance(part, nn.Parameter) else part.parameters() for part in (*modules, *self.tail())]
        return list({id(parameter): parameter for part in parts for parameter in part}.values())

    def _split(self, grid: tuple[int, int], num_last: int) -> tuple[Sequence[Block], Sequence[Block], Sequence[Block]]:
        """Blocks before the features, blocks after them that run as they are, and blocks that the mode reads."""
        self._check_num_last(num_last)
        blocks, count = self.blocks_at(grid), self.num_blocks
        num_read = min(MODES[self.mode].num_blocks, count)
        start = count - max(num_last, num_read)
        return blocks[:start], blocks[start : count - num_read], blocks[count - num_read :]
