"""Dense modes against their formulas written out with matrices of attention, on small random blocks, in float64.

Axes: B images, T tokens (P prefix, then N patches), C width, A heads, K width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from arrcoc.backbones.dense import DEFAULT_MODE, MODES, Block, Last, neighbourhood
from watch_operators import FusedAttention, Sizes

WIDTH, HEADS = 12, 3
GRID = (3, 5)


class PlainBlock(Block):
    """A block of four linear layers and two norms, with a layer scale."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> None:
        module = nn.ModuleDict(
            {
                "norm_1": nn.LayerNorm(WIDTH),
                "qkv": nn.Linear(WIDTH, 3 * WIDTH),
                "out": nn.Linear(WIDTH, WIDTH),
                "norm_2": nn.LayerNorm(WIDTH),
                "mlp": nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH)),
            }
        ).to(dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        super().__init__(module.requires_grad_(False), 0.7)

    def norm_1(self, tokens: Tensor) -> Tensor:
        return self.module["norm_1"](tokens)

    def qkv(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.module["qkv"](normed).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def output(self, heads: Tensor) -> Tensor:
        return 0.3 * self.module["out"](heads)

    def norm_2(self, tokens: Tensor) -> Tensor:
        return self.module["norm_2"](tokens)

    def mlp(self, normed: Tensor) -> Tensor:
        return self.module["mlp"](normed)


# ---- the slow truth: one image, one head, one row at a time


def slow_rows(logits_TT: Tensor) -> Tensor:
    rows = [torch.exp(row - row.max()) for row in logits_TT]
    return torch.stack([row / row.sum() for row in rows])


def slow_heads(block: PlainBlock, x_TC: Tensor, weights: Callable[..., Tensor]) -> Tensor:
    """Heads side by side [T, C]; ``weights(q, k, v)`` gives what a token listens to, [T, T], for one head."""
    normed = block.norm_1(x_TC)
    q, k, v = block.module["qkv"](normed).split(WIDTH, dim=-1)
    size = WIDTH // HEADS
    parts = [slice(a * size, (a + 1) * size) for a in range(HEADS)]
    return torch.cat([weights(q[:, part], k[:, part], v[:, part]) @ v[:, part] for part in parts], dim=-1)


def slow_block(block: PlainBlock, x_TC: Tensor) -> Tensor:
    x = x_TC + block.output(slow_heads(block, x_TC, lambda q, k, v: slow_rows(q @ k.T * block.scale)))
    return x + block.mlp(block.norm_2(x))


def slow_mlp(block: PlainBlock, x: Tensor) -> Tensor:
    return x + block.mlp(block.norm_2(x))


def slow_maskclip(blocks: list[PlainBlock], x: Tensor, num_prefix: int) -> Tensor:
    heads = slow_heads(blocks[-1], x, lambda q, k, v: torch.eye(len(q), dtype=q.dtype))
    return slow_mlp(blocks[-1], x + blocks[-1].output(heads))


def slow_sclip(blocks: list[PlainBlock], x: Tensor, num_prefix: int) -> Tensor:
    scale = blocks[-1].scale
    heads = slow_heads(blocks[-1], x, lambda q, k, v: slow_rows(q @ q.T * scale) + slow_rows(k @ k.T * scale))
    return slow_mlp(blocks[-1], x + blocks[-1].output(heads))


def slow_clearclip(blocks: list[PlainBlock], x: Tensor, num_prefix: int) -> Tensor:
    return blocks[-1].output(slow_heads(blocks[-1], x, lambda q, k, v: slow_rows(q @ q.T * blocks[-1].scale)))


def slow_naclip(blocks: list[PlainBlock], x: Tensor, num_prefix: int) -> Tensor:
    def weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = k @ k.T * blocks[-1].scale
        for i in range(GRID[0] * GRID[1]):
            for j in range(GRID[0] * GRID[1]):
                (row, column), (other_row, other_column) = divmod(i, GRID[1]), divmod(j, GRID[1])
                squared = (row - other_row) ** 2 + (column - other_column) ** 2
                logits[num_prefix + i, num_prefix + j] += math.exp(-squared / (2 * 5.0**2))
        return slow_rows(logits)

    return blocks[-1].output(slow_heads(blocks[-1], x, weights))


def slow_surgery(blocks: list[PlainBlock], x: Tensor, num_prefix: int) -> Tensor:
    path = x
    for block in blocks:
        path = path + block.output(slow_heads(block, x, lambda q, k, v, block=block: slow_rows(v @ v.T * block.scale)))
        x = slow_block(block, x)
    return path


def slow_gem(blocks: list[PlainBlock], x: Tensor, num_prefix: int) -> Tensor:
    path = x
    for block in blocks:
        tau = sum(row.square().sum().sqrt() for row in block.norm_1(x)) / len(x) / math.sqrt(WIDTH // HEADS)

        def weights(q: Tensor, k: Tensor, v: Tensor, tau: Tensor = tau) -> Tensor:
            total = torch.zeros(len(q), len(q), dtype=q.dtype)
            for s in (q, k, v):
                unit = torch.stack([row / row.norm() for row in s])
                grouped = slow_rows(tau * unit @ unit.T) @ unit
                unit = torch.stack([row / row.norm() for row in grouped])
                total += slow_rows(tau * unit @ unit.T) / 3
            return total

        path = path + block.output(slow_heads(block, x, weights))
        x = slow_block(block, x)
    return path


def slow_raw(blocks: list[PlainBlock], x: Tensor, num_prefix: int) -> Tensor:
    return x


SLOW = {
    "raw": slow_raw,
    "maskclip": slow_maskclip,
    "sclip": slow_sclip,
    "clearclip": slow_clearclip,
    "naclip": slow_naclip,
    "surgery": slow_surgery,
    "gem": slow_gem,
}


def case(num_blocks: int, num_prefix: int, dtype: torch.dtype = torch.float64) -> tuple[list[PlainBlock], Tensor]:
    generator = torch.Generator().manual_seed(num_blocks * 10 + num_prefix)
    blocks = [PlainBlock(generator, dtype) for _ in range(num_blocks)]
    tokens = torch.randn(2, num_prefix + GRID[0] * GRID[1], WIDTH, generator=generator, dtype=torch.float64)
    return blocks, tokens.to(dtype)


def read(
    mode: str, blocks: list[PlainBlock], tokens: Tensor, num_prefix: int, num_pooled: int
) -> tuple[Tensor, Tensor]:
    return MODES[mode].read(Last(blocks=blocks, tokens=tokens, num_prefix=num_prefix, grid=GRID, num_pooled=num_pooled))


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_equals_its_formula(mode: str, num_prefix: int) -> None:
    blocks, tokens = case({0: 0, 1: 1, 6: 3}[MODES[mode].num_blocks], num_prefix)
    for num_pooled in (num_prefix, tokens.shape[1]):
        patches, pooled = read(mode, blocks, tokens, num_prefix, num_pooled)
        for image in range(2):
            expected = SLOW[mode](blocks, tokens[image], num_prefix)[num_prefix:]
            torch.testing.assert_close(patches[image], expected, atol=1e-10, rtol=1e-10)
            own = tokens[image]
            for block in blocks:
                own = slow_block(block, own)
            if mode != "raw":
                assert pooled.shape[1] == num_pooled
            torch.testing.assert_close(pooled[image], own[: pooled.shape[1]], atol=1e-10, rtol=1e-10)


def test_every_mode_is_tested_and_declared() -> None:
    assert list(SLOW) == list(MODES)
    assert {name: mode.num_blocks for name, mode in MODES.items()} == {
        "raw": 0, "maskclip": 1, "sclip": 1, "clearclip": 1, "naclip": 1, "surgery": 6, "gem": 6,
    }  # fmt: skip
    for name, mode in MODES.items():
        assert mode.orientation == {"class token": -1 if name == "raw" else 1, "average": 1, "attention": 1}
        assert mode.from_empty_text == (name == "surgery")
    assert DEFAULT_MODE == {"class token": "clearclip", "average": "raw", "attention": "raw"}


def test_the_neighbourhood_is_a_gaussian_of_the_distance_on_the_grid() -> None:
    bias = neighbourhood((3, 5), torch.zeros((), dtype=torch.float64))
    assert bias.shape == (15, 15) and bias.dtype == torch.float64
    assert torch.equal(bias.diagonal(), torch.ones(15, dtype=torch.float64))
    assert bias[0, 14].item() == pytest.approx(math.exp(-(2**2 + 4**2) / 50), rel=1e-6)
    assert bias[7, 2].item() == pytest.approx(math.exp(-1 / 50), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_no_matrix_of_attention_is_made(mode: str) -> None:
    """naclip's Gaussian, [N, N] without batch and heads, is the one exception: it depends on the grid alone."""
    blocks, tokens = case(6, 2, torch.float32)
    blocks, num_tokens = blocks[: MODES[mode].num_blocks], tokens.shape[1]
    with FusedAttention() as attention, Sizes() as sizes:
        read(mode, blocks, tokens, 2, 2)
    square = sizes.with_two_axes_of({num_tokens, num_tokens - 2})
    assert not square or (mode == "naclip" and all(len(shape) == 2 for shape in square))
    calls = {"raw": 0, "maskclip": 1, "sclip": 3, "clearclip": 2, "naclip": 2, "surgery": 12, "gem": 42}
    assert attention.calls == calls[mode]


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_differentiable(mode: str) -> None:
    blocks, tokens = case(2 if MODES[mode].num_blocks > 1 else MODES[mode].num_blocks, 1)
    tokens = tokens[:1, :7].requires_grad_()
    last = lambda x: Last(blocks=blocks, tokens=x, num_prefix=1, grid=(2, 3), num_pooled=1)  # noqa: E731
    assert torch.autograd.gradcheck(lambda x: MODES[mode].read(last(x)), tokens)
