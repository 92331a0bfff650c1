"""The photos that ship with the package, with hand-drawn outlines."""

from __future__ import annotations

from arrcoc.assets import asset_path
from arrcoc.data.coco import CocoFolder


def sample_photos(*, absent_queries: int = 0) -> CocoFolder:
    """Four free photos: an astronaut, a cat, a cup of coffee and a rocket, with 13 kinds of things to ask for.

    The outlines are complete for these kinds, so absent queries are truly absent. The limits of coverage are wider than
    a ``CocoFolder``'s own, which keeps the cat that fills its photo.

    Args:
        absent_queries: names of things that are not in the photo to add to each, >= 0.
    """
    return CocoFolder(asset_path("photos"), min_coverage=0.005, max_coverage=0.8, absent_queries=absent_queries)
