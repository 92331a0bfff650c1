"""open_clip models as backbones: wrapped as they are, and loaded with their real weights or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from arrcoc.backbones.convolutional_tower import ConvolutionalTower
from arrcoc.backbones.open_clip_towers import check_config, find_tower
from arrcoc.backbones.specs import did_you_mean, did_you_mean_folder
from arrcoc.backbones.wrapped import WrappedModel, check_eval

_CONVOLUTIONAL_TOKENS_PER_SIDE = 14  # 448 px at stride 32: what average-pooled towers see best of small things
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pth")
_GET_WEIGHTS = "Download {file} where the network works and load it as {spec!r}, or use 'embedded', which is offline."


class OpenClipBackbone(WrappedModel):
    """An open_clip model, wrapped without changing it.

    Args:
        model: CLIP or CustomTextCLIP in eval mode, with a tower that `find_tower` knows.
        tokenizer: list of str -> token numbers [Q, context], e.g. ``open_clip.get_tokenizer(name)``.
        spec: name stored in checkpoints.
        mean, std: channel statistics; None takes those that open_clip left on the model (``visual.preprocess_cfg``).
        mode: how patch tokens are read, one of dense.py's modes; None for the tower's default: ``"clearclip"`` where a
            class token is pooled, ``"raw"`` elsewhere. Convolutional towers offer ``"raw"`` alone.
        tokens_per_side: tokens along a picture's longest side at scale 1; None: the native grid of a transformer, at
            least 14 for a convolutional tower.

    Raises:
        ValueError: if the model is in training mode, the tower is not supported, the tokenizer does not fit, or mode or
            statistics are unknown.

    Example:
        >>> backbone = OpenClipBackbone(model.eval(), tokenizer, spec="mine")      # doctest: +SKIP
        >>> backbone(images).patches.shape, backbone.encode_text(["a cup"]).shape  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        spec: str,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        mode: str | None = None,
        tokens_per_side: int | None = None,
    ) -> None:
        visual = getattr(model, "visual", None)
        if not isinstance(model, nn.Module) or visual is None or not hasattr(model, "encode_text"):
            raise ValueError(f"model must be a CLIP, CustomTextCLIP or CoCa of open_clip, got {type(model).__name__}.")
        check_eval(model)
        tower = find_tower(visual, mode)
        native = max(tower.native_grid)
        if isinstance(tower, ConvolutionalTower):
            native = max(native, _CONVOLUTIONAL_TOKENS_PER_SIDE)
        left: dict[str, Any] = getattr(visual, "preprocess_cfg", {})
        super().__init__(
            model,
            tokenizer,
            tower,
            spec=spec,
            mean=left.get("mean") if mean is None else mean,
            std=left.get("std") if std is None else std,
            origin="as open_clip leaves them on a model with weights",
            tokens_per_side=tokens_per_side,
            native=native,
        )

    @torch.no_grad()
    def _encode_texts(self, texts: list[str]) -> Tensor:
        return cast(Any, self.model).encode_text(self.tokenizer(texts).to(self.device))  # type: ignore[no-any-return]


def load_local(path: str | Path, *, spec: str, mode: str | None = None) -> OpenClipBackbone:
    """Load a folder in open_clip's ``local-dir:`` format: open_clip_config.json, weights and tokenizer files if any.

    Raises:
        FileNotFoundError: if the folder, its configuration or its weights are missing.
        ValueError: if the configuration is broken or the weights do not fit it.
    """
    folder = Path(path)
    config = folder / "open_clip_config.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"open_clip local-dir {str(folder)!r} is not a folder.")
    if not config.is_file():
        raise FileNotFoundError(
            f"open_clip local-dir {str(folder)!r} has no open_clip_config.json{did_you_mean_folder(folder)}."
        )
    if not any(True for pattern in _WEIGHT_FILES for _ in folder.glob(pattern)):
        raise FileNotFoundError(
            f"open_clip local-dir {str(folder)!r} has no weights ({', '.join(_WEIGHT_FILES)}); "
            "a model with random weights is of no use."
        )
    try:
        json.loads(config.read_text(encoding="utf-8"))["model_cfg"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{config} must be JSON with a 'model_cfg', got {error!r}.") from error
    return _build(f"local-dir:{folder}", None, spec=spec, mode=mode, source=str(folder))


def load_pretrained(name_and_weights: str, *, spec: str, mode: str | None = None) -> OpenClipBackbone:
    """Load ``NAME/PRETRAINED``: one of open_clip's architectures with one of its weight tags, or with a weights file.

    A tag brings its own activation (QuickGELU or GELU) and channel statistics. A file says neither: there the name
    decides, so weights of OpenAI, MetaCLIP and DFN need the ``-quickgelu`` variant of the name.

    Raises:
        ValueError: if the name, the tag or the file is unknown (close names are listed), the tower is not supported, or
            the weights do not fit.
        ConnectionError: if the weights are not on this machine and cannot be downloaded.
    """
    with _quiet():
        import open_clip

    if name_and_weights.startswith("hf-hub:"):
        hub_name = name_and_weights.removeprefix("hf-hub:")
        raise ValueError(
            f"'hf-hub:' is not read here: fetch the model with `hf download {hub_name} --local-dir FOLDER` and load "
            f"'open_clip:local-dir:FOLDER', got {spec!r}."
        )
    name, _, weights = name_and_weights.partition("/")
    if name not in open_clip.list_models():
        if hint := did_you_mean_folder(name_and_weights):
            raise ValueError(f"{name_and_weights!r} is a folder, and no name of open_clip's{hint}.")
        raise ValueError(f"open_clip has no model {name!r}{did_you_mean(name, open_clip.list_models())}.")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not weights:
        raise ValueError(
            f"'open_clip:{name}' names no weights; write open_clip:{name}/TAG or open_clip:{name}/WEIGHTS_FILE, "
            f"where TAG is one of: {', '.join(tags) or '(none)'}."
        )
    config = open_clip.get_pretrained_cfg(name, weights)
    if not config:
        if not Path(weights).is_file():
            raise ValueError(
                f"{weights!r} is neither a weights file nor a tag of open_clip's {name}{did_you_mean(weights, tags)}; "
                f"its tags are {', '.join(tags) or '(none)'}."
            )
        shared = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
        config = {key: shared[0][key] for key in ("mean", "std") if len({cfg[key] for cfg in shared}) == 1}
        return _build(name, weights, spec=spec, mode=mode, source=weights, preprocess=config)
    check_config(name, open_clip.get_model_config(name)["vision_cfg"])
    try:
        with _quiet():
            file = open_clip.download_pretrained(config)
    except Exception as error:  # the hub's errors have no common base, and all mean the same to the user
        quickgelu = f"{name}-quickgelu"
        variant = quickgelu if config.get("quick_gelu") and quickgelu in open_clip.list_models() else name
        address = f"https://huggingface.co/{config['hf_hub']}" if config.get("hf_hub") else config.get("url")
        advice = _GET_WEIGHTS.format(file=f"the weights file at {address}", spec=f"open_clip:{variant}/PATH")
        raise ConnectionError(f"weights of {spec!r} are not on this machine and cannot be fetched. {advice}") from error
    quick_gelu = bool(config.get("quick_gelu"))
    return _build(name, file, spec=spec, mode=mode, source=file, preprocess=config, quick_gelu=quick_gelu)


def _build(
    name: str,
    weights: str | None,
    *,
    spec: str,
    mode: str | None,
    source: str,
    preprocess: dict[str, Any] | None = None,
    quick_gelu: bool = False,
) -> OpenClipBackbone:
    """Create the model, fill every weight from the file, freeze it: it is ours, nobody else holds it."""
    with _quiet():
        import open_clip
    statistics = {key: tuple(preprocess[key]) for key in ("mean", "std") if preprocess and key in preprocess}
    try:
        # open_clip draws random weights before it fills them in: leave the caller's random stream where it was
        with _quiet(), torch.random.fork_rng(devices=[]):
            model = open_clip.create_model(
                name,
                weights,
                force_quick_gelu=quick_gelu,
                force_preprocess_cfg=statistics,
                require_pretrained=True,
            )
    except Exception as error:  # pickle, safetensors, torch, timm and json each have their own
        raise ValueError(f"cannot load the weights of {spec!r} from {source!r}: {error}") from error
    try:
        with _quiet():
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # OSError, ValueError and more for a file that is missing here or at the hub
        raise ValueError(f"cannot load the tokenizer of {spec!r}: {error}") from error
    # Channels last: the same numbers, and convolutions on a CPU take two thirds of the time.
    model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return OpenClipBackbone(model, tokenizer, spec=spec, mode=mode)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's ``logging.info`` from configuring the root logger of a program that has not done so itself."""
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
