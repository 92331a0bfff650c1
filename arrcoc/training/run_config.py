"""A whole training run as settings: what is learned, on what, how, and where it goes; the same in file and code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from arrcoc.config import HeadShape, TrainConfig
from arrcoc.data.augment import RelevanceAugmentation
from arrcoc.data.queries import TEMPLATES, QueryVariants
from arrcoc.data.spec import DataConfig
from sam_core._checks import check_count


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained.

    Args:
        backbone: as ``load_backbone`` takes it, e.g. "embedded" or "open_clip:ViT-B-16/openai".
        mode: how patch tokens are read off it; its default if none.
        orientation: 1 or -1, the sign of its similarity that means relevance; as it declares if none.
        scales: sizes at which pictures are seen, relative to the default one.
        init: head to start from: "none" for a new one, "default", or a folder.
    """

    backbone: str = "embedded"
    mode: str | None = None
    orientation: int | None = None
    scales: tuple[float, ...] = (1.0,)
    init: str = "none"

    def __post_init__(self) -> None:
        if self.orientation not in (None, 1, -1):
            raise ValueError(f"orientation must be 1, -1 or none, got {self.orientation!r}.")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How samples become batches.

    Args:
        batch_size: pictures a batch, of all ranks together.
        num_queries: queries a picture.
        workers: processes that read pictures; 0 reads them in the main one.
        cache: folder in which tokens are kept from run to run; in memory if none.
        augment: change the pictures at random, anew in every epoch; they then pass the backbone in every epoch.
        augment_options: arguments of RelevanceAugmentation, e.g. flip or crop.
        templates: ask in other words, such as "a photo of a ...".
    """

    batch_size: int = 16
    num_queries: int = 6
    workers: int = 0
    cache: str | None = None
    augment: bool = False
    augment_options: dict[str, Any] = field(default_factory=dict)
    templates: bool = False

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, at_least=1)
        check_count("num_queries", self.num_queries, at_least=1)
        check_count("workers", self.workers, at_least=0)
        if self.augment_options and not self.augment:
            raise ValueError(f"augment must be true for augment_options, got {self.augment_options!r} without it.")
        self.augmentation()

    def augmentation(self) -> RelevanceAugmentation | None:
        """What changes pictures, None for nothing.

        Raises:
            ValueError: for an option that it does not have or refuses.
        """
        if not self.augment:
            return None
        options: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in self.augment_options.items()
        }
        try:
            return RelevanceAugmentation(**options)
        except TypeError as error:
            raise ValueError(f"augment_options must be arguments of RelevanceAugmentation: {error}.") from error

    def query_variants(self, synonyms: str | None) -> QueryVariants | None:
        """Other words for queries, with those of a JSON file of synonyms if there is one; None for none."""
        templates = TEMPLATES if self.templates else ()
        if synonyms is not None:
            return QueryVariants.from_json(synonyms, templates=templates)
        return QueryVariants(templates=templates) if templates else None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training run.

    Args:
        data: data set, e.g. "scenes", "coco:PATH", "folder:PATH", "manifest:PATH", "hf:NAME" or "shards:PATTERN".
        output: folder where everything goes.
        device: e.g. "cpu" or "cuda"; the CPU if none.
        tensorboard: write curves for TensorBoard too.
        overlays: validation pictures that are drawn with their relevance after every epoch.
        reading: how the data set is read.
        loader: how samples become batches.
        model: which model is trained.
        head: shape of its head, if that is a new one.
        train: how it is trained.
    """

    data: str = "scenes"
    output: str = "runs/relevance"
    device: str | None = None
    tensorboard: bool = False
    overlays: int = 0
    # One seed for all (train.seed), and both splits are read.
    reading: DataConfig = field(default=DataConfig(absent_queries=2), metadata={"hidden": ("split", "seed")})
    loader: LoaderConfig = field(default=LoaderConfig())
    model: ModelConfig = field(default=ModelConfig(), metadata={"flags": {"backbone": "model"}})
    head: HeadShape = field(default=HeadShape(text_rank=32))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=20))

    def __post_init__(self) -> None:
        check_count("overlays", self.overlays, at_least=0)
