"""Anchors: directions of words in the teacher's feature space.

ImageNet's 1,000 class names have one each, the classifier's row. The words of captions that it lacks (people above
all) get one by multiple-instance learning: a photo's score for a word is a soft maximum over its tokens, and must say
whether a caption uses the word. It starts at a kernel average of class rows and is held close to it.

People are not among ImageNet's classes, but what they wear is: their words are the mean of the garments' rows.

Axes: A anchors, V words, D feature width, K whitened width, P photos, T tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

KERNEL_WIDTH = 0.08  # of the softmax over similarities of sentence embeddings
WIDTH = 512  # leading whitened dimensions in which words are learned
_MIN_PHOTOS, _MAX_PHOTOS = 10, 700
_POOLING = 0.5  # temperature of the soft maximum
_STEPS, _LR, _BATCH, _DECAY = 300, 0.01, 128, 50.0

COLOURS = "red orange yellow green blue purple pink brown black white grey gray tan".split()
_ADJECTIVES = (*COLOURS, "striped", "wooden")
PEOPLE = (
    "man woman boy girl child people person kid baby lady guy adult toddler crowd player climber hiker skier rider "
    "male female family body human"
).split()
_GARMENTS = (
    "jersey,jean,suit,groom,ballplayer,scuba diver,cowboy hat,sunglasses,sunglass,sweatshirt,swimming trunks,bikini,"
    "miniskirt,gown,cardigan,trench coat,kimono,lab coat,military uniform,poncho,academic gown,sarong,maillot,pajama,"
    "overskirt,hoopskirt,fur coat,wig,ski mask,bow tie,Windsor tie,brassiere,sock,running shoe,abaya,vestment,apron,"
    "stole,bulletproof vest,bonnet,sombrero,bathing cap,crash helmet,football helmet,bolo tie,backpack,mitten"
).split(",")
_PLURALS = {"men": "man", "women": "woman", "children": "child", "people": "people", "leaves": "leaf", "skies": "sky"}
_PLURAL_ONLY = "shorts jeans pants glasses sunglasses trunks clothes stairs woods".split()
_EMPTY_WORDS = set(
    "a in is on as at an no it be he so up down out all one two three four five i ii by over back while s are was or t "
    "am do does have has front next side top other others lot something someone way middle edge distance right left "
    "line past set get look day view background picture area group couple several part kind use being inside outside "
    "outdoors looking watch watches stand stands run runs walk walks jump jumps sit sits play plays hold holds climb "
    "looks ride rides pose poses take takes catch leap slide swing there who make using going few like can try put "
    "show doe ready full above close open high behind".split()
)


def caption_vocabulary(captions: Sequence[Sequence[str]], nouns: set[str]) -> tuple[list[str], Tensor]:
    """Words that 10 to 700 photos use, and whether each photo uses each: bool [P, V]."""
    bags = [{_singular(word, nouns) for word in re.findall("[a-z]+", " ".join(texts).lower())} for texts in captions]
    counts = Counter(word for bag in bags for word in bag)
    words = [
        word
        for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if _MIN_PHOTOS <= count <= _MAX_PHOTOS
        and (word in nouns or word in _ADJECTIVES)
        and word not in _EMPTY_WORDS
        and len(word) > 2
    ]
    return words, torch.tensor([[word in bag for word in words] for bag in bags])


def _singular(word: str, nouns: set[str]) -> str:
    if word in _PLURALS:
        return _PLURALS[word]
    if word in _PLURAL_ONLY:
        return word
    if word.endswith("ies") and word[:-3] + "y" in nouns:
        return word[:-3] + "y"
    if word.endswith("es") and word[:-2] in nouns and word[:-1] not in nouns:
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss") and word[:-1] in nouns:
        return word[:-1]
    return word


def garment_direction(class_names: Sequence[str], class_rows: Tensor) -> Tensor:
    """Mean classifier row [D] of what people wear."""
    return class_rows[[number for number, name in enumerate(class_names) if name in _GARMENTS]].mean(0)


def learn_words(start: Tensor, tokens: Tensor, present: Tensor, *, seed: int) -> Tensor:
    """Directions [V, K] by multiple-instance learning.

    Args:
        start: first guess [V, K], in whitened units.
        tokens: whitened tokens [P, T, K].
        present: bool [P, V].
        seed: of the order of the photos.
    """
    generator = torch.Generator().manual_seed(seed)
    start = F.normalize(start, dim=-1)
    change = torch.zeros_like(start, requires_grad=True)
    gain = torch.ones(len(start), requires_grad=True)
    share = present.float().mean(0)
    bias = torch.logit(share.clamp(1e-3, 1 - 1e-3)).requires_grad_()
    optimizer = torch.optim.Adam([change, gain, bias], lr=_LR)
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _LR * min(1.0, 2 * (1 - step / _STEPS))
        index = torch.randint(len(tokens), (_BATCH,), generator=generator)
        scores = tokens[index].float() @ (gain[:, None] * start + change).T
        pooled = _POOLING * (torch.logsumexp(scores / _POOLING, 1) - torch.tensor(float(scores.shape[1])).log())
        loss = F.binary_cross_entropy_with_logits(pooled + bias, present[index].float(), reduction="none").sum(1).mean()
        (loss + _DECAY / len(tokens) * change.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return F.normalize((gain[:, None] * start + change).detach(), dim=-1)
