"""Pictures with queries and masks: samples by number (``RelevanceDataset``) or in a row (``RecordStream``).

spec           load_data: any of the following by a short text, as command lines name it; DataConfig
sample         RelevanceSample, RelevanceDataset, and coverage: the share of each token that a mask covers
scenes         Scenes, drawn by our own code: vocabulary, shapes, backgrounds
photos         sample_photos, the photos that ship with the package

coco           CocoFolder: categories, captions or referring sentences; polygons, run lengths, boxes (coco_records)
folder         FolderDataset: images/ and masks/QUERY/
manifest       ManifestDataset, stream_manifest, read_manifest: JSON lines
hugging_face   HuggingFaceDataset, stream_hugging_face: the library datasets
webdataset     stream_shards, iterate_shards: tar files
writers        write_manifest, write_shards: any data set as one of these

records        Record, RecordDataset: what all readers share; streams: RecordStream
selection      Selection: splits, limits, absent queries; splits: split_by_image, Splits and their file
augment        RelevanceAugmentation: random changes that keep masks and queries true
queries        QueryVariants: templates and synonyms; absent_names
entries        what is asked of a picture, as JSON says it
regions        Region: a mask picture, boxes, polygons or run lengths as a mask (masks); pictures: stored pictures
skips          Skips, ItemError: what was not used and why
"""

from arrcoc.data.augment import RelevanceAugmentation
from arrcoc.data.coco import CocoFolder
from arrcoc.data.folder import FolderDataset
from arrcoc.data.hugging_face import HuggingFaceDataset, stream_hugging_face
from arrcoc.data.manifest import ManifestDataset, read_manifest, stream_manifest
from arrcoc.data.photos import sample_photos
from arrcoc.data.queries import QueryVariants
from arrcoc.data.records import Record, RecordDataset
from arrcoc.data.regions import Region
from arrcoc.data.sample import RelevanceDataset, RelevanceSample, coverage
from arrcoc.data.scenes import Scenes
from arrcoc.data.selection import Selection
from arrcoc.data.skips import ItemError, Skips
from arrcoc.data.spec import DataConfig, load_data
from arrcoc.data.splits import Splits, read_splits, split_by_image, write_splits
from arrcoc.data.streams import RecordStream
from arrcoc.data.webdataset import iterate_shards, stream_shards
from arrcoc.data.writers import write_manifest, write_shards

__all__ = [
    "CocoFolder",
    "DataConfig",
    "FolderDataset",
    "HuggingFaceDataset",
    "ItemError",
    "ManifestDataset",
    "QueryVariants",
    "Record",
    "RecordDataset",
    "RecordStream",
    "Region",
    "RelevanceAugmentation",
    "RelevanceDataset",
    "RelevanceSample",
    "Scenes",
    "Selection",
    "Skips",
    "Splits",
    "coverage",
    "iterate_shards",
    "load_data",
    "read_manifest",
    "read_splits",
    "sample_photos",
    "split_by_image",
    "stream_hugging_face",
    "stream_manifest",
    "stream_shards",
    "write_manifest",
    "write_shards",
    "write_splits",
]
