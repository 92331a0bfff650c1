"""The text tower: a small causal transformer of open_clip that learns the joint direction of every text.

Targets are the teacher's: kernel over the anchors of a sentence embedding, as a direction in the joint space. A noun
has the same target in every template, so "cat" and "a photo of a cat" ask the same.

Axes: Q texts, J joint width, L tokens of a text.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

if TYPE_CHECKING:
    from open_clip.transformer import TextTransformer

PAD, UNK, CLS, SEP = range(4)
CONTEXT = 32
VOCABULARY = 9000
TEMPLATES = "{},{},a {},the {},a photo of a {},a photo of the {},a picture of a {},{} in the photo".split(",")
_DECAY = 0.02
_NOUNS, _PHRASES = 192, 64  # of a batch


def prune_tokenizer(tokenizer_file: Path, texts: Sequence[str]) -> Tokenizer:
    """The WordPiece tokenizer with the pieces that the texts use most, and every single character it had."""
    source = Tokenizer.from_file(str(tokenizer_file))
    source.no_padding()
    source.no_truncation()
    counts: Counter[str] = Counter()
    for encoding in source.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoding.tokens)
    old = source.get_vocab()
    characters = sorted(p for p in old if len(p.removeprefix("##")) == 1 and ord(p[-1]) < 0x250)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    kept = dict.fromkeys([*special, *characters, *(piece for piece, _ in counts.most_common() if piece in old)])
    pieces = list(kept)[:VOCABULARY]
    settings = json.loads(source.to_str())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] in special]
    for token in settings["added_tokens"]:
        token["id"] = special.index(token["content"])
    settings["model"]["vocab"] = {piece: number for number, piece in enumerate(pieces)}
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in (("[CLS]", CLS), ("[SEP]", SEP))
        },
    }
    settings["padding"] = settings["truncation"] = None
    return Tokenizer.from_str(json.dumps(settings))


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Token numbers [Q, 32], as open_clip's HFTokenizer makes them."""
    out = torch.full((len(texts), CONTEXT), PAD, dtype=torch.long)
    for row, encoding in zip(out, tokenizer.encode_batch(list(texts)), strict=True):
        ids = encoding.ids if len(encoding.ids) <= CONTEXT else [*encoding.ids[: CONTEXT - 1], SEP]
        row[: len(ids)] = torch.tensor(ids)
    return out


def train_text_tower(
    tower: TextTransformer,
    tokenizer: Tokenizer,
    nouns: tuple[Sequence[str], Tensor],
    phrases: tuple[Sequence[str], Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """Minimise 1 - cosine between the tower's embedding and the target.

    Args:
        tower: the tower, in place.
        nouns: texts put into templates, and their unit-norm targets [Q, J].
        phrases: texts used as they are, and theirs.
        steps, lr, seed: number of steps, peak learning rate, and the order's seed.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    phrase_tokens = tokenize(tokenizer, phrases[0])
    optimizer = torch.optim.AdamW(tower.parameters(), lr=lr, weight_decay=_DECAY, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    tower.train()
    bar = tqdm(range(steps), desc="text tower")
    running = 0.0
    for _ in bar:
        index = torch.randint(len(nouns[0]), (_NOUNS,), generator=generator)
        other = torch.randint(len(phrases[0]), (_PHRASES,), generator=generator)
        texts = [rng.choice(TEMPLATES).format(nouns[0][number]) for number in index.tolist()]
        # Short and long texts apart, so that none is padded much.
        with torch.autocast("cpu", torch.bfloat16):
            short, long = _encode(tower, tokenize(tokenizer, texts)), _encode(tower, phrase_tokens[other])
        embeddings, target = torch.cat([short, long]).float(), torch.cat([nouns[1][index], phrases[1][other]])
        loss = 1 - F.cosine_similarity(embeddings, target, dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if not running else 0.99 * running + 0.01 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}")
    tower.eval()


def _encode(tower: TextTransformer, tokens: Tensor) -> Tensor:
    """The tower on the positions in use: the mask is causal, so what follows the end of a text does not matter."""
    length = int((tokens != PAD).sum(1).max())
    tokens = tokens[:, :length]
    x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
    ends = (tokens == SEP).int().argmax(-1)
    embeddings: Tensor = tower.text_projection(x[torch.arange(len(x)), ends])
    return embeddings


@torch.no_grad()
def encode(tower: TextTransformer, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Unit-norm embeddings [Q, J]."""
    chunks = [tokenize(tokenizer, texts[start : start + 512]) for start in range(0, len(texts), 512)]
    return F.normalize(torch.cat([_encode(tower, chunk) for chunk in chunks]), dim=-1)


@torch.no_grad()
def start_from_pieces(tower: TextTransformer, tokenizer: Tokenizer, nouns: tuple[Sequence[str], Tensor]) -> None:
    """Initialise each piece's embedding: the mean target of the nouns it occurs in, turned into the tower's width."""
    width = tower.token_embedding.weight.shape[1]
    sums = torch.zeros(len(tower.token_embedding.weight), nouns[1].shape[1])
    counts = torch.zeros(len(sums), 1)
    encodings = tokenizer.encode_batch(list(nouns[0]), add_special_tokens=False)
    for encoding, target in zip(encodings, nouns[1], strict=True):
        share = 1 / max(1, len(encoding.ids))
        for number in encoding.ids:
            sums[number] += share * target
            counts[number] += share
    means = F.normalize(sums / counts.clamp(min=1e-6), dim=-1)
    basis = torch.linalg.svd(nouns[1], full_matrices=False).Vh[:width]
    seen = counts[:, 0] > 0
    tower.token_embedding.weight[seen] = 0.1 * (means @ basis.T)[seen]
