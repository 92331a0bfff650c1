"""Scoring of many pictures: files, folders, manifests and shards in, tables of relevance out.

- `score_many`: score a stream of pictures into JSON lines or Parquet; resumable
- `ScoringSummary`: what it returns
- `read_inputs`: the stream of pictures that inputs name
- `read_scores`: the records of an output, in order
"""

from arrcoc.scoring.inputs import read_inputs
from arrcoc.scoring.many import ScoringSummary, score_many
from arrcoc.scoring.tables import read_scores

__all__ = ["ScoringSummary", "read_inputs", "read_scores", "score_many"]
