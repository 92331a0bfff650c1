"""The relevance head against its formula in plain loops, float64."""

from __future__ import annotations

import math

import pytest
import torch

from arrcoc import HeadConfig, RelevanceHead
from arrcoc.model.similarity import flatness_weights, level_similarity, map_sharpness, similarity_logits
from arrcoc.tokens import VisualTokens, fuse
from models import TinyBackbone


def random_head(seed: int = 0, **options: int) -> RelevanceHead:
    generator = torch.Generator().manual_seed(seed)
    head = RelevanceHead(HeadConfig(embed_dim=5, **options)).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return head


def random_inputs(num_images: int = 2, num_tokens: int = 6, num_queries: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(num_images, num_tokens, 5, generator=generator, dtype=torch.float64)
    queries = torch.nn.functional.normalize(
        torch.randn(num_images, num_queries, 5, generator=generator, dtype=torch.float64), dim=-1
    )
    return patches, queries, queries @ patches.mT


OPTIONS: list[dict[str, int]] = [
    {},
    {"affinity_dim": 3},
    {"text_rank": 2},
    {"objectness_dim": 3},
    {"text_rank": 2, "affinity_dim": 2, "objectness_dim": 3},
]


def slow_head(head: RelevanceHead, patches: torch.Tensor, queries: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(S)
    for b in range(len(patches)):
        x = patches[b] / math.sqrt((patches[b] ** 2).mean())
        looks = [head.affinity_weight @ token for token in x] if head.config.affinity_dim else list(x)
        looks = [look / look.norm() for look in looks]
        for q in range(S.shape[1]):
            s = S[b, q].clone()
            if head.config.text_rank:
                for i in range(len(x)):
                    s[i] += (head.query_factor @ queries[b, q]) @ (head.token_factor @ x[i])
            ranking = torch.empty_like(s)
            for i in range(len(x)):
                weights = torch.stack([torch.exp(head.log_sharpness.exp() * (looks[i] @ look)) for look in looks])
                spread = (weights / weights.sum() * s).sum()
                ranking[i] = head.self_gain * s[i] + head.spread_gain * spread
                if head.config.objectness_dim:
                    hidden = torch.nn.functional.gelu(head.objectness_weight @ x[i])
                    ranking[i] += hidden @ head.objectness_gain
            level = head.mean_gain * ranking.mean() + head.peak_gain * ranking.max() + head.bias
            out[b, q] = head.log_gain.exp() * ranking + level
    return out


@pytest.mark.parametrize("options", OPTIONS)
def test_head_is_its_formula(options: dict[str, int]) -> None:
    head, inputs = random_head(**options), random_inputs()
    torch.testing.assert_close(head(*inputs), slow_head(head, *inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"text_rank": 2, "objectness_dim": 3}])
def test_new_head_is_the_similarity(options: dict[str, int]) -> None:
    patches, queries, similarity = random_inputs()
    head = RelevanceHead(HeadConfig(embed_dim=5, **options)).double()
    torch.testing.assert_close(head(patches, queries, similarity), similarity, rtol=0, atol=0)


def test_affinity_does_not_depend_on_the_units_of_the_backbone() -> None:
    head, (patches, queries, similarity) = random_head(text_rank=2, affinity_dim=3, objectness_dim=3), random_inputs()
    torch.testing.assert_close(
        head(100 * patches, queries, similarity), head(patches, queries, similarity), rtol=1e-9, atol=1e-9
    )


def test_calibration_keeps_the_order() -> None:
    head, inputs = random_head(), random_inputs()
    assert torch.equal(head(*inputs).argsort(-1), head.ranking(*inputs).argsort(-1))


def test_every_weight_of_the_head_can_learn() -> None:
    head, inputs = random_head(text_rank=2, affinity_dim=3, objectness_dim=3), random_inputs()
    head(*inputs).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_same_seed_same_head() -> None:
    config = HeadConfig(embed_dim=5, affinity_dim=2)
    a, b = RelevanceHead(config), RelevanceHead(config, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a.affinity_weight, RelevanceHead(config).affinity_weight)
    assert not torch.equal(a.affinity_weight, b.affinity_weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be an integer >= 1, got 0."),
        ({"embed_dim": 4, "text_rank": -1}, "text_rank must be an integer >= 0, got -1."),
        ({"embed_dim": 4, "affinity_dim": 2.5}, "affinity_dim must be an integer >= 0, got 2.5."),
    ],
)
def test_bad_head_config(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig(**options)


def test_similarity_is_scale_times_dot_plus_bias() -> None:
    backbone = TinyBackbone(logit_bias=-2.0)
    patches, queries = torch.rand(1, 4, 3), torch.eye(3)[None]
    torch.testing.assert_close(level_similarity(backbone, patches, queries), 4 * patches.mT - 2)
    backbone.orientation = -1
    torch.testing.assert_close(level_similarity(backbone, patches, queries), -4 * patches.mT - 2)


def test_similarity_without_a_bias_is_centred() -> None:
    backbone = TinyBackbone(logit_bias=None)
    similarity = level_similarity(backbone, torch.rand(2, 4, 3), torch.eye(3).expand(2, 3, 3))
    torch.testing.assert_close(similarity.mean(-1), torch.zeros(2, 3), atol=1e-6, rtol=0)


def test_sharpness_of_a_map_is_the_gradient_norm_of_its_relevance() -> None:
    backbone = TinyBackbone()
    patches = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    query = torch.nn.functional.normalize(torch.randn(1, 1, 3, dtype=torch.float64), dim=-1)
    similarity = level_similarity(backbone, patches, query)
    (gradient,) = torch.autograd.grad(torch.sigmoid(similarity).sum(), patches)
    torch.testing.assert_close(map_sharpness(backbone, similarity)[0, 0], gradient.norm())


def test_flat_scales_weigh_more() -> None:
    weights = flatness_weights(torch.tensor([[1.0], [2.0], [4.0]]))
    torch.testing.assert_close(weights, torch.tensor([[4.0], [2.0], [1.0]]) / 7)


def test_levels_are_weighted_by_flatness() -> None:
    backbone = TinyBackbone()
    levels = tuple(VisualTokens(torch.rand(1, 4, 3) * gain, torch.rand(1, 3), (2, 2)) for gain in (0.2, 2.0))
    queries = torch.eye(3)[None]
    maps = [level_similarity(backbone, level.patches, queries) for level in levels]
    weights = flatness_weights(torch.stack([map_sharpness(backbone, one) for one in maps]))
    expected = weights[0, ..., None] * maps[0] + weights[1, ..., None] * maps[1]
    torch.testing.assert_close(similarity_logits(backbone, fuse(levels), queries), expected)
    assert (weights - 0.5).abs().max() > 0.01  # the scales differ, so that the weighting is seen
