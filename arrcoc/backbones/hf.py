"""transformers' CLIP, MetaCLIP 2, SigLIP and SigLIP 2 as backbones: with their real weights or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from arrcoc.backbones.hf_files import find_folder, model_type, quiet, statistics
from arrcoc.backbones.hf_towers import find_tower
from arrcoc.backbones.wrapped import WrappedModel, check_eval


class HuggingFaceBackbone(WrappedModel):
    """A transformers CLIPModel, MetaClip2Model, SiglipModel or Siglip2Model, wrapped without changing it.

    Texts are padded as in training: SigLIP to the full context and without a mask, on the right, in lower case (some
    tokenizers of SigLIP 2 checkpoints forget to); CLIP as far as the longest text. Whatever attention the model was
    loaded with (sdpa, eager, flash), its vision blocks are read with PyTorch's fused attention.

    Args:
        model: in eval mode.
        tokenizer: the model's own, e.g. ``transformers.AutoTokenizer.from_pretrained(name)``.
        spec: name stored in checkpoints.
        mean, std: channel statistics, ``image_mean`` and ``image_std`` of the model's preprocessor.
        mode: a dense mode; None for the default of the tower: "clearclip" for CLIP, "raw" for SigLIP.
        tokens_per_side: tokens along a picture's longest side at scale 1; None: the native grid.

    Raises:
        ValueError: if the model is in training mode or of another kind, the tokenizer does not fit, or mode or
            statistics are unknown.

    Example:
        >>> backbone = HuggingFaceBackbone(model.eval(), tokenizer, spec="mine", mean=mean, std=std)  # doctest: +SKIP
        >>> backbone(images).patches.shape, backbone.encode_text(["a cup"]).shape                    # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        spec: str,
        mean: Sequence[float],
        std: Sequence[float],
        mode: str | None = None,
        tokens_per_side: int | None = None,
    ) -> None:
        tower = find_tower(model, mode)
        check_eval(model)
        super().__init__(
            model,
            tokenizer,
            tower,
            spec=spec,
            mean=mean,
            std=std,
            origin="image_{name} of the model's preprocessor",
            tokens_per_side=tokens_per_side,
            native=max(tower.native_grid),
        )
        end = _end_of_text(model)
        if end is not None and end not in self._tokenize(["a"])["input_ids"]:
            raise ValueError(f"tokenizer must end each text with {end}, where the model reads its embedding.")

    @torch.no_grad()
    def _encode_texts(self, texts: list[str]) -> Tensor:
        embeddings: Tensor = cast(Any, self.model).get_text_features(**self._tokenize(texts)).pooler_output
        return embeddings

    def _tokenize(self, texts: list[str]) -> Any:
        config = cast(Any, self.model).config
        siglip = config.model_type.startswith("siglip")
        return self.tokenizer(
            [text.lower() for text in texts] if siglip else texts,
            padding="max_length" if siglip else "longest",
            padding_side="right",
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_attention_mask=not siglip,
            return_tensors="pt",
        ).to(self.device)


def load_hf(name_or_path: str | Path, *, spec: str, mode: str | None = None) -> HuggingFaceBackbone:
    """Load a folder in the Hub's format, or a model of the Hub by name.

    The folder holds config.json, model.safetensors (or pytorch_model.bin; shards too), tokenizer files, and the channel
    statistics in preprocessor_config.json (or processor_config.json). Of a name, a complete copy in the Hub's cache is
    used without asking the network; else the files are downloaded, the weights last. HF_HUB_OFFLINE and HF_HOME are
    respected. No code from a repository is ever run.

    Raises:
        FileNotFoundError: if the folder, its configuration, statistics, tokenizer or weights are missing.
        ValueError: if the model is of a kind that is not supported, or its weights are incomplete or do not fit.
        ConnectionError: if the files are not on this machine and cannot be downloaded.
        ImportError: if the tokenizer needs sentencepiece.
    """
    folder = find_folder(str(name_or_path), spec)
    mean, std = statistics(folder)
    with quiet():
        model = _load_model(folder, spec)
        tokenizer = _load_tokenizer(folder, spec)
    return HuggingFaceBackbone(model, tokenizer, spec=spec, mean=mean, std=std, mode=mode)


def _load_model(folder: Path, spec: str) -> nn.Module:
    """Every weight from the file, frozen; the caller's random stream stays where it was."""
    import transformers

    classes: dict[str, Any] = {
        "clip": transformers.CLIPModel,
        "metaclip_2": transformers.MetaClip2Model,
        "siglip": transformers.SiglipModel,
        "siglip2": transformers.Siglip2Model,
    }
    try:
        with torch.random.fork_rng(devices=[]):
            model, report = classes[model_type(folder, spec)].from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
    except Exception as error:  # pickle, safetensors, torch and json each have their own
        raise ValueError(f"cannot load the weights of {spec!r} from {str(folder)!r}: {error}") from error
    mismatched = [key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]]
    for problem, keys in (("lacks", sorted(report["missing_keys"])), ("has other shapes for", sorted(mismatched))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"cannot load the weights of {spec!r}: {str(folder)!r} {problem} {', '.join(keys[:3])}{more}; "
                "a model with random weights is of no use."
            )
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def _load_tokenizer(folder: Path, spec: str) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise ImportError(
            f"the tokenizer of {spec!r} needs more packages: pip install 'arrcoc[siglip]' (sentencepiece, protobuf)."
        ) from error
    except Exception as error:  # OSError, ValueError, KeyError and more
        raise ValueError(f"cannot load the tokenizer of {spec!r} from {str(folder)!r}: {error}") from error


def _end_of_text(model: Any) -> int | None:
    """The number of the token at which a CLIP reads a text; None for SigLIP, which reads the last one whatever it is.

    Old configurations of CLIP say 2, which stands for the largest number in the text.
    """
    kind, end = model.config.model_type, getattr(model.text_model, "eos_token_id", None)
    return None if kind.startswith("siglip") or (kind == "clip" and end == 2) else end
