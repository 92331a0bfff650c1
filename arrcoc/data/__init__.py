"""Pictures with queries and masks; a data set is any ``Sequence[RelevanceSample]``.

sample   RelevanceSample, RelevanceDataset, and coverage: the share of each token that a mask covers
scenes   Scenes, drawn by our own code: vocabulary, shapes, backgrounds
coco     CocoFolder, a folder in COCO format: masks, splits
photos   sample_photos, the photos that ship with the package
"""

from arrcoc.data.coco import CocoFolder
from arrcoc.data.photos import sample_photos
from arrcoc.data.sample import RelevanceDataset, RelevanceSample, coverage
from arrcoc.data.scenes import Scenes
from arrcoc.data.splits import split_by_image

__all__ = ["CocoFolder", "RelevanceDataset", "RelevanceSample", "Scenes", "coverage", "sample_photos", "split_by_image"]
