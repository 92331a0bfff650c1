"""A model folder in the format of the Hugging Face Hub: found here or fetched, and looked at before it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arrcoc.backbones.hf_towers import MODEL_TYPES
from arrcoc.backbones.specs import did_you_mean_folder

_SMALL_FILES = ("*.json", "*.txt", "*.model")
_SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
_WEIGHTS = (*_SAFETENSORS, *_PICKLES)
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_GET_MODEL = (
    "Where the network works, run `hf download {name} --local-dir FOLDER`, copy the folder here and load it as "
    "'hf:FOLDER', or use 'embedded', which is offline."
)


def find_folder(name: str, spec: str) -> Path:
    """The folder of that name, or a complete copy of the Hub's model, fetched if it is not in the cache.

    Raises:
        FileNotFoundError: if name is neither a folder nor a name of the Hub, or the folder lacks something.
        ValueError: if the Hub has no such model or it is of a kind that is not supported.
        ConnectionError: if it is not on this machine and cannot be fetched.
    """
    folder = Path(name) if Path(name).is_dir() else _fetch(name, spec)
    model_type(folder, spec)
    _require(folder, "tokenizer", _TOKENIZERS)
    _require(folder, "weights", _WEIGHTS)
    return folder


def statistics(folder: Path) -> tuple[Any, Any]:
    """image_mean and image_std of the preprocessor, wherever this version of the format keeps them; None if missing.

    Raises:
        FileNotFoundError: if there is no preprocessor_config.json, nor a processor_config.json that holds it.
        ValueError: if it is no JSON object.
    """
    if _has(folder, ("processor_config.json",)):
        nested = _read_json(folder, "processor_config.json").get("image_processor")
        if isinstance(nested, dict):
            return nested.get("image_mean"), nested.get("image_std")
    plain = _read_json(folder, "preprocessor_config.json")
    return plain.get("image_mean"), plain.get("image_std")


def model_type(folder: Path, spec: str) -> str:
    """The kind of model that config.json names, one of MODEL_TYPES.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: if it is no JSON object, or the kind is not supported.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model folder {str(folder)!r} has no config.json{did_you_mean_folder(folder)}.")
    config = _read_json(folder, "config.json")
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"{spec!r} is a model of type {kind!r}, which is not supported. Types that work: clip, metaclip_2, "
            "siglip (which SigLIP 2 of a fixed size has too) and siglip2 (NaFlex)."
        )
    return str(kind)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' reports and progress bars to errors, and put back what the program had chosen."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, bars, no_hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # the hub's as well
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if no_hub_bars:
            disable_progress_bars()


def _fetch(name: str, spec: str) -> Path:
    """The Hub's model in its cache: as it is if it is complete, else the small files first and the weights last."""
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"{name!r} is neither a folder nor a name of the Hugging Face Hub, such as ORG/MODEL.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    def fetch(*patterns: str, offline: bool = False) -> Path:
        return Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, *patterns], local_files_only=offline))

    try:
        cached = fetch(offline=True)
        if all(_has(cached, part) for part in (("config.json",), _PREPROCESSORS, _TOKENIZERS, _WEIGHTS)):
            return cached
    except OSError:
        pass  # nothing of it is here
    try:
        with quiet():
            model_type(fetch(), spec)  # refuse what is not supported before gigabytes are fetched
        folder = fetch(*_SAFETENSORS)
        return folder if _has(folder, _SAFETENSORS) else fetch(*_PICKLES)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the Hugging Face Hub has no model {name!r}, or it is gated or private: accept its terms there and run "
            "`hf auth login`."
        ) from error
    except ValueError:
        raise
    except Exception as error:  # the hub's errors have no common base, and all mean the same to the user
        raise ConnectionError(
            f"{spec!r} is not on this machine and cannot be fetched. {_GET_MODEL.format(name=name)}"
        ) from error


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    _require(folder, name, (name,))
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / name} must be JSON, got {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{folder / name} must hold a JSON object, got {type(content).__name__}.")
    return content


def _has(folder: Path, patterns: Sequence[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _require(folder: Path, what: str, patterns: Sequence[str]) -> None:
    if not _has(folder, patterns):
        names = "" if patterns == (what,) else f" ({', '.join(patterns)})"
        raise FileNotFoundError(f"model folder {str(folder)!r} has no {what}{names}.")
