"""Sample photos with hand-drawn outlines, and textures, from the free pictures in scikit-image's wheel.

    pip install "arrcoc[build-model]"
    python scripts/make_sample_assets.py [assets]

writes ``photos/images/*.jpg``, ``photos/instances.json`` (COCO format) and ``textures/*.jpg``. Sources and licences are
in the README.md beside the pictures. The outlines were drawn by hand and are accurate to a few pixels; a lattice tower
is outlined as a whole, the sky that shows through included.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from arrcoc._files import atomic_path, write_text
from arrcoc.data.masks import fill_polygons

LONGEST_SIDE = 512

LICENCES = {"astronaut": 1, "chelsea": 2, "coffee": 2, "rocket": 1}
LICENCE_NAMES = {1: "Public domain", 2: "CC0 1.0"}

SPACE_SHUTTLE = (
    "407,0 423,0 431,13 436,28 438,46 437,57 441,41 444,39 447,41 453,58 456,76 456,212 457,218 456,235 "
    "455,238 455,249 460,262 459,265 453,266 454,272 472,275 472,279 434,284 416,285 414,290 383,290 369,284 "
    "368,273 368,262 378,236 382,230 358,230 354,223 355,211 363,200 378,181 377,142 379,107 381,94 381,61 "
    "385,43 388,40 393,48 396,61 396,33 399,18"
)

# photo -> [(what, points)]: "x,y x,y ..." in pixels of the saved photo; x to the right, y down; pixel i is [i, i + 1].
OUTLINES: dict[str, list[tuple[str, str]]] = {
    "astronaut": [
        (
            "person",
            "231,15 241,16 256,20 271,28 287,39 297,58 302,80 301,90 298,107 289,119 281,127 278,135 272,138 267,136 "
            "266,145 261,157 256,173 266,179 279,190 291,206 300,221 304,234 320,244 335,254 342,265 346,274 351,285 "
            "355,300 358,320 363,332 361,335 365,348 364,351 357,352 340,357 326,366 315,375 305,387 298,391 293,399 "
            "293,408 289,420 283,439 278,462 277,480 277,486 281,500 285,512 36,512 30,495 25,474 23,455 23,425 20,406 "
            "20,394 24,386 26,373 26,345 30,333 35,317 40,305 40,296 46,281 55,263 60,256 77,234 101,218 114,206 "
            "112,200 114,195 112,188 117,185 121,183 124,173 131,163 141,155 152,149 164,147 178,147 184,148 184,132 "
            "180,131 175,125 172,120 169,115 159,107 155,96 153,77 155,63 164,50 180,39 190,34 199,25 211,20 220,16",
        ),
        (
            "helmet",
            "364,351 378,346 392,343 406,343 420,345 439,351 455,359 472,374 486,397 493,415 496,432 497,449 502,454 "
            "503,458 507,465 509,484 512,487 512,512 285,512 281,500 277,486 278,462 283,439 289,420 293,408 293,399 "
            "298,391 305,387 315,375 326,366 340,357 357,352",
        ),
        (
            "flag",
            "0,0 42,0 49,21 56,44 61,70 64,88 70,105 77,131 83,159 88,180 93,204 97,221 77,234 60,256 55,263 46,281 "
            "40,296 40,305 35,317 30,333 26,345 26,373 24,386 20,394 20,406 23,425 23,455 25,474 30,495 36,512 0,512",
        ),
        (
            "space shuttle",
            SPACE_SHUTTLE,
        ),
        ("rocket", SPACE_SHUTTLE),
        ("eye", "193,101 199,96 206,96 212,101 208,105 197,105"),
        ("eye", "237,103 244,97 250,97 256,101 253,107 242,107"),
        ("nose", "224,95 231,95 236,115 240,127 234,133 226,131 219,132 213,127 216,115"),
    ],
    "chelsea": [
        (
            "cat",
            "40,0 398,0 378,33 361,65 355,73 360,97 363,124 360,154 351,181 338,201 321,214 316,228 316,248 311,264 "
            "303,273 292,300 0,300 0,126 13,122 22,114 29,98 31,78 31,45 37,20",
        ),
        (
            "eye",
            "139,89 150,86 167,85 182,88 197,98 206,110 206,124 198,139 184,145 171,145 155,138 143,125 137,111 137,98",
        ),
        (
            "eye",
            "295,150 296,141 301,129 310,117 321,111 335,110 342,115 342,129 337,144 328,157 318,164 306,163 298,159",
        ),
        (
            "nose",
            "241,233 247,229 254,228 264,230 276,232 288,232 292,235 289,240 282,245 275,253 268,260 261,265 256,267 "
            "252,260 250,251 248,245 241,237",
        ),
    ],
    "coffee": [
        (
            "cup",
            "147,93 150,77 157,62 169,46 186,32 204,22 224,16 244,15 265,17 287,23 307,33 322,44 335,58 344,75 348,90 "
            "348,107 347,119 344,137 339,151 334,163 329,172 325,180 320,187 318,198 309,205 299,208 287,216 280,224 "
            "274,231 260,240 243,243 230,240 224,230 220,208 212,218 205,232 198,251 186,262 173,257 167,244 169,232 "
            "179,209 186,201 173,186 160,164 152,141 148,118",
        ),
        (
            "coffee",
            "174,118 186,100 202,89 221,82 243,81 266,84 289,94 304,106 314,124 316,137 300,151 278,162 262,165 "
            "243,164 221,160 202,152 186,141 177,129",
        ),
        (
            "spoon",
            "339,60 345,57 352,57 358,60 362,66 359,80 356,94 351,108 349,116 343,139 337,159 332,176 327,196 329,204 "
            "335,213 342,222 346,230 347,238 344,249 337,261 327,271 315,276 303,277 291,272 282,262 278,249 278,238 "
            "281,227 287,216 299,208 309,205 318,198 320,187 325,180 329,172 334,163 339,151 344,137 347,119 348,107 "
            "348,95 347,85 344,75",
        ),
        (
            "plate",
            "155,61 135,70 114,82 100,95 87,110 78,126 72,141 66,163 65,183 68,205 76,236 91,262 114,289 141,308 "
            "167,320 205,329 247,332 281,330 316,323 342,310 365,293 384,270 398,243 406,213 409,186 406,160 399,141 "
            "384,118 369,101 356,90 356,94 351,108 349,116 343,139 337,159 332,176 327,196 329,204 335,213 342,222 "
            "346,230 347,238 344,249 337,261 327,271 315,276 303,277 291,272 282,262 278,249 278,238 280,226 274,231 "
            "260,240 243,243 230,240 224,230 220,208 212,218 205,232 198,251 186,262 173,257 167,244 169,232 179,209 "
            "186,201 173,186 160,164 152,141 148,118 147,93 150,77",
        ),
    ],
    "rocket": [
        (
            "rocket",
            "258,101 262,104 265,109 267,115 267,138 268,143 268,148 265,149 265,290 266,307 266,326 250,326 251,240 "
            "251,149 248,147 248,144 249,138 249,115 251,109 254,104",
        ),
        (
            "tower",
            "36,0 71,0 69,70 68,122 65,200 63,278 60,316 58,342 0,342 0,270 12,200 22,139 33,55 37,34 41,8 36,6",
        ),
        (
            "tower",
            "158,98 163,98 162,153 164,156 163,342 130,342 136,290 142,232 148,178 152,153 157,152 158,120",
        ),
        (
            "tower",
            "355,98 359,98 361,152 366,154 367,180 371,215 376,265 380,300 384,342 351,342 352,300 352,230 353,180 "
            "353,155 357,153",
        ),
        ("tower", "447,0 481,0 486,40 502,130 512,180 512,342 465,342 459,250 452,140 448,50"),
    ],
}

# texture -> (left, top, right, bottom) in the original, longest side when saved
TEXTURES: dict[str, tuple[str, tuple[int, int, int, int], int]] = {
    "brick": ("brick", (0, 0, 512, 512), 256),
    "grass": ("grass", (0, 0, 384, 384), 256),
    "gravel": ("gravel", (0, 0, 512, 512), 256),
    "wood": ("coffee", (486, 232, 600, 346), 114),
    "sky": ("rocket", (215, 10, 305, 100), 64),
    "canvas": ("astronaut", (303, 100, 375, 172), 72),
}


def _shrink(picture: Image.Image, longest_side: int) -> Image.Image:
    scale = min(1.0, longest_side / max(picture.size))
    width, height = (round(side * scale) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _save(picture: Image.Image, path: Path, quality: int) -> None:
    with atomic_path(path) as temporary:
        picture.save(temporary, format="JPEG", quality=quality, optimize=True)


def make_photos(folder: Path) -> None:
    """Write the photos, and their outlines as ``instances.json``."""
    names = sorted({what for outlines in OUTLINES.values() for what, _ in outlines})
    category_ids = {name: number for number, name in enumerate(names, start=1)}
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for image_id, (name, outlines) in enumerate(OUTLINES.items(), start=1):
        picture = _shrink(Image.fromarray(getattr(skimage.data, name)()), LONGEST_SIDE)
        _save(picture, folder / "images" / f"{name}.jpg", quality=90)
        width, height = picture.size
        images.append(
            {
                "id": image_id,
                "file_name": f"{name}.jpg",
                "width": width,
                "height": height,
                "license": LICENCES[name],
            }
        )
        for what, points in outlines:
            ring = np.array([[float(number) for number in point.split(",")] for point in points.split()])
            low, high = ring.min(axis=0), ring.max(axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[what],
                    "segmentation": [ring.flatten().tolist()],
                    "area": int(fill_polygons([ring], height, width).sum()),
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "iscrowd": 0,
                }
            )
    coco = {
        "info": {"description": "Photos from scikit-image with hand-drawn outlines (outlines: CC0 1.0)"},
        "licenses": [{"id": number, "name": name} for number, name in LICENCE_NAMES.items()],
        "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
        "images": images,
        "annotations": annotations,
    }
    write_text(folder / "instances.json", json.dumps(coco) + "\n")


def make_textures(folder: Path) -> None:
    """Write square crops that show one material each; grey ones stay grey."""
    for name, (source, box, longest_side) in TEXTURES.items():
        crop = Image.fromarray(getattr(skimage.data, source)()).crop(box)
        _save(_shrink(crop, longest_side), folder / f"{name}.jpg", quality=85)


if __name__ == "__main__":
    assets = Path(sys.argv[1] if len(sys.argv) > 1 else "assets")
    make_photos(assets / "photos")
    make_textures(assets / "textures")
    total = sum(path.stat().st_size for part in ("photos", "textures") for path in (assets / part).rglob("*.*"))
    print(f"wrote {assets / 'photos'} and {assets / 'textures'}: {total / 1000:.0f} kB")
