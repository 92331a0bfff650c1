"""Perturbations: a function of the seed alone, harsher with severity, and as strong as they say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from arrcoc.evaluation.perturbations import CORRUPTIONS, SEVERITIES, strength, token_noise
from arrcoc.model.robustness import perturb_tokens
from arrcoc.tokens import VisualTokens, fuse


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _photo(height: int = 90, width: int = 120) -> Image.Image:
    """A smooth picture with some texture."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.sin(x / 9 + phase) * np.cos(y / 7 - phase) + 0.3 * np.sin(x * 1.3 + y) for phase in (0, 1, 2)]
    return Image.fromarray((np.stack(channels, -1).clip(-1, 1) * 80 + 110).astype(np.uint8))


def _tokens(scale: float = 1.0) -> VisualTokens:
    patches = scale * torch.randn(2, 400, 64, generator=_seeded(1))
    return VisualTokens(patches, patches.mean(1), (20, 20))


def test_every_perturbation_has_five_documented_strengths() -> None:
    assert list(SEVERITIES) == ["token_noise", *CORRUPTIONS]
    for name, strengths in SEVERITIES.items():
        assert len(strengths) == 5
        assert list(strengths) == sorted(strengths, reverse=name in ("jpeg", "contrast")), name
        assert strength(name, 2) == strengths[1]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_keeps_the_format_and_repeats_with_its_seed(name: str) -> None:
    photo = _photo()
    before = photo.tobytes()
    once, twice, other = (CORRUPTIONS[name](photo, 3, generator=_seeded(seed)) for seed in (0, 0, 1))
    assert (once.mode, once.size) == ("RGB", photo.size)
    assert once.tobytes() == twice.tobytes()
    assert (once.tobytes() != other.tobytes()) == (name == "gaussian_noise")  # the only one that draws
    assert photo.tobytes() == before


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_grows_with_severity(name: str) -> None:
    photo = _photo()
    clean = np.asarray(photo, dtype=np.float64)
    errors = [
        np.square(np.asarray(CORRUPTIONS[name](photo, severity, generator=_seeded()), dtype=np.float64) - clean).mean()
        for severity in range(1, 6)
    ]
    assert errors[0] > 1
    assert all(low < high for low, high in itertools.pairwise(errors)), errors


def test_gaussian_noise_has_its_sigma() -> None:
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    noisy = np.asarray(CORRUPTIONS["gaussian_noise"](grey, 2, generator=_seeded()), dtype=np.float64)
    assert noisy.std() / 255 == pytest.approx(0.08, rel=0.02)
    assert noisy.mean() == pytest.approx(128, abs=0.3)


def test_brightness_and_contrast_are_what_they_say() -> None:
    grey = Image.fromarray(np.array([[[50] * 3, [100] * 3, [150] * 3]], dtype=np.uint8))
    values = {
        name: np.asarray(CORRUPTIONS[name](grey, 4, generator=_seeded()))[0, :, 0]
        for name in SEVERITIES
        if name in CORRUPTIONS
    }
    assert values["brightness"].tolist() == [100, 200, 255]
    assert values["contrast"].tolist() == [90, 100, 110]


def test_blur_means_the_same_at_any_resolution() -> None:
    small = _photo(112, 112)
    large = small.resize((448, 448), Image.Resampling.BICUBIC)
    blurred = [CORRUPTIONS["blur"](photo, 3, generator=_seeded()) for photo in (small, large)]
    difference = np.asarray(blurred[0], float) - np.asarray(blurred[1].resize((112, 112), Image.Resampling.BOX), float)
    assert np.abs(difference).mean() < 1.5
    assert np.abs(np.asarray(blurred[0], float) - np.asarray(small, float)).mean() > 5


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_token_noise_is_relative_to_the_rms_of_the_patches(scale: float) -> None:
    tokens = _tokens(scale)
    noisy = perturb_tokens(tokens, 0.5, _seeded())
    difference = noisy.patches - tokens.patches
    rms = tokens.patches.square().mean((1, 2)).sqrt()
    torch.testing.assert_close(difference.std((1, 2)), 0.5 * rms, rtol=0.02, atol=0)
    assert noisy.grid == tokens.grid
    assert noisy.pooled is tokens.pooled
    assert torch.equal(noisy.patches, perturb_tokens(tokens, 0.5, _seeded()).patches)
    assert not torch.equal(noisy.patches, perturb_tokens(tokens, 0.5, _seeded(1)).patches)


def test_token_noise_by_severity_keeps_the_dtype() -> None:
    tokens = _tokens()
    half = VisualTokens(tokens.patches.half(), tokens.pooled.half(), tokens.grid)
    assert token_noise(half, 5, generator=_seeded()).patches.dtype == torch.float16
    by_rho = perturb_tokens(tokens, SEVERITIES["token_noise"][2], _seeded())
    assert torch.equal(token_noise(tokens, 3, generator=_seeded()).patches, by_rho.patches)
    assert torch.equal(perturb_tokens(tokens, 0, _seeded()).patches, tokens.patches)


def test_every_scale_gets_its_own_noise() -> None:
    tokens = _tokens()
    noisy = perturb_tokens(fuse((tokens, tokens)), 0.5, _seeded())
    first, second = (level.patches - tokens.patches for level in noisy.levels)
    rms = tokens.patches.square().mean((1, 2)).sqrt()
    for noise in (first, second, (first - second) / 2**0.5):
        torch.testing.assert_close(noise.std((1, 2)), 0.5 * rms, rtol=0.02, atol=0)
    torch.testing.assert_close(noisy.patches, tokens.patches + (first + second) / 2)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"severity must be 1, 2, 3, 4 or 5, got 6\."):
        CORRUPTIONS["jpeg"](_photo(), 6, generator=_seeded())
    with pytest.raises(ValueError, match=r"perturbation must be one of token_noise, gaussian_noise, .* got 'fog'\."):
        strength("fog", 1)
    for rho in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"rho must be (finite|>= 0), got"):
            perturb_tokens(_tokens(), rho, _seeded())
