"""Made-up datasets in each layout, and images damaged in each way."""

import csv
import io
import itertools
import json
import re

import numpy as np
from PIL import Image

SPLITS = {"train": 24, "val": 5, "test": 6}


def pixels(seed=0, width=41, height=29):
    """Returns [height, width, 3] uint8 with smooth contents, which JPEG keeps nearly unchanged."""
    rng = np.random.default_rng(seed)
    corners = Image.fromarray(rng.integers(0, 255, (3, 4, 3)).astype(np.uint8))
    return np.array(corners.resize((width, height), Image.Resampling.BILINEAR))


def encoded(image, kind="JPEG", **options):
    """Returns the bytes of an image or of pixels in a format."""
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(seed=0, **size):
    """Returns a plain RGB JPEG."""
    return encoded(pixels(seed, **size), quality=95)


def _images(folder):
    """Writes the images; yields (split, name of the file, captions)."""
    (folder / "images").mkdir(parents=True)
    number = 0
    for split, count in SPLITS.items():
        for _ in range(count):
            name = f"image{number}.jpg"
            (folder / "images" / name).write_bytes(jpeg(number, width=30 + number % 11))
            yield split, name, [f"Image {number}, seen {n} times." for n in range(2 + number % 3)]
            number += 1


def write_coco(folder):
    """Writes Karpathy's COCO: folders by year, ids of its own, a `restval` split."""
    entries = []
    for split, name, captions in _images(folder):
        number = len(entries)
        year = "train2014" if split == "train" else "val2014"
        (folder / "images" / year).mkdir(exist_ok=True)
        (folder / "images" / name).rename(folder / "images" / year / name)
        entries.append(
            {
                "filename": name,
                "filepath": year,
                "split": "restval" if number == 3 else split,
                "imgid": number,
                "cocoid": 391_000 + 7 * number,
                "sentences": [
                    {"raw": text, "sentid": 770_000 + 10 * number + n}
                    for n, text in enumerate(captions)
                ],
            }
        )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return entries


def write_json_lists(folder):
    """Writes the authors' three lists."""
    lists = {split: [] for split in SPLITS}
    for split, name, captions in _images(folder):
        if split == "train":
            lists[split] += [
                {"image": name, "caption": text, "image_id": f"id_{name}"} for text in captions
            ]
        else:
            lists[split].append({"image": name, "caption": captions})
    for split, entries in lists.items():
        (folder / f"flickr_{split}.json").write_text(json.dumps(entries))
    return lists


def table_rows(folder):
    """Writes the images and returns rows of pairs, the captions of an image apart."""
    rows = [
        {"image": f"images/{name}", "caption": text, "split": split, "image_id": 90 - number}
        for number, (split, name, captions) in enumerate(_images(folder))
        for text in captions
    ]
    return rows[::2] + rows[1::2]


def write_csv(folder, rows, columns=("image", "caption", "split", "image_id")):
    """Writes a table of rows."""
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(folder, rows):
    """Writes a line a row."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _filled_up(content):
    half = len(content) // 2
    return content[:half] + bytes(len(content) - half)


# Ten kinds of damage that images come with; each takes a number and returns a file's content.
DAMAGED_IMAGES = {
    "empty": lambda n: b"",
    "a page of HTML": lambda n: b"<!DOCTYPE html><title>404</title>" + b" " * n,
    "noise": lambda n: np.random.default_rng(n).bytes(500 + n),
    "JPEG cut off": lambda n: jpeg(n)[: -20 - 11 * n],
    "JPEG cut off and filled with zeros": lambda n: _filled_up(jpeg(n)),
    "PNG cut off": lambda n: encoded(pixels(n), "PNG")[: 60 + 11 * n],
    "JPEG without its tables": lambda n: jpeg(n).replace(b"\xff\xdb", b"\xff\xe5"),
    "one pixel wide": lambda n: jpeg(n, width=1, height=40 + n),
    "floating-point TIFF": lambda n: encoded(pixels(n)[..., 0].astype(np.float32), "TIFF"),
    "an EPS program": lambda n: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + b" " * n,
}


def _base(rng):
    """Returns the content of an intact image of some kind, mostly a JPEG."""
    size = {"width": int(rng.integers(30, 200)), "height": int(rng.integers(30, 200))}
    image = pixels(int(rng.integers(1000)), **size)
    turned = Image.Exif()
    turned[0x0112] = int(rng.integers(1, 9))
    options = [
        {},
        {"quality": int(rng.integers(5, 100))},
        {"progressive": True},
        {"restart_marker_blocks": 2},
        {"subsampling": 0},
        {"subsampling": 1, "optimize": True},
        {"exif": turned},
    ]
    chosen = int(rng.integers(len(options) + 3))
    if chosen < len(options):
        return encoded(image, **options[chosen])
    if chosen == len(options):
        return encoded(Image.fromarray(image).convert(str(rng.choice(["L", "CMYK"]))))
    return encoded(image, str(rng.choice(["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])))


def _place(content, rng, first=2):
    return int(rng.integers(first, max(first + 1, len(content) - 2)))


def _without_bytes(content, rng):
    place = _place(content, rng)
    return content[:place] + content[place + int(rng.integers(1, 60)) :]


def _with_zeros(content, rng):
    place, count = _place(content, rng), int(rng.integers(1, 60))
    return content[:place] + bytes(count) + content[place + count :]


def _with_other_bytes(content, rng, last=None):
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        changed[_place(content[:last], rng)] = int(rng.integers(256))
    return bytes(changed)


def _with_a_part_twice(content, rng):
    place, count = _place(content, rng), int(rng.integers(1, 200))
    return content[: place + count] + content[place:]


def _without_a_segment(content, rng):
    starts = [match.start() for match in re.finditer(rb"\xff[\xc0-\xfe]", content[2:-4])]
    if not starts:
        return content[2:]
    place = 2 + starts[int(rng.integers(len(starts)))]
    return content[:place] + content[place + 2 + int.from_bytes(content[place + 2 : place + 4]) :]


def _spliced(content, rng):
    other = _base(rng)
    return content[: _place(content, rng)] + other[_place(other, rng) :]


# Ten kinds of damage to an image of any format; each takes its content and a generator.
DAMAGES = {
    "cut off": lambda c, rng: c[: _place(c, rng)],
    "cut off and ended": lambda c, rng: c[: _place(c, rng)] + b"\xff\xd9",
    "cut off and filled up": lambda c, rng: c[: (n := _place(c, rng))] + bytes(len(c) - n),
    "bytes missing": _without_bytes,
    "bytes zeroed": _with_zeros,
    "bytes changed": _with_other_bytes,
    "bytes of the head changed": lambda c, rng: _with_other_bytes(c, rng, last=400),
    "a part twice": _with_a_part_twice,
    "a segment missing": _without_a_segment,
    "two files in one": _spliced,
}


def damaged_images(count):
    """Yields (kind, content) of images damaged in all ways of `DAMAGES` in turn."""
    for number, kind in zip(range(count), itertools.cycle(DAMAGES)):
        rng = np.random.default_rng(number)
        yield kind, DAMAGES[kind](_base(rng), rng)


DAMAGED_CAPTIONS = {
    "nothing": None,
    "a number": 7,
    "empty": "",
    "only marks": " ... !",
    "too long": "a " * 1001,
    "half a character": "a dog \ud800",
    "no value": "NaN",
    "a formula that failed": " #NAME? ",
    "a list as NumPy writes it": "['a' 'b']",
}
