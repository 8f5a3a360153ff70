"""Public data sets from their own lists → rows, and what is listed but not there.

    read("vggsound", videos, lists)

Each list is read as it is published; nothing has to be renamed or converted first. A
clip's id is what its list calls it: `ID_000030` (first second, six digits) in AudioSet
and VGGSound, `ID_000030_000040` in Kinetics, `Class/v_Class_g01_c01` in UCF101, the
number in Something-Something, the narration in EPIC-KITCHENS, the file in ESC-50. Its
file is found by that name at any depth of the folder, in any container; see
`_names`. Where a file bears only the id of the video that a clip is from, it may be
that clip already or the whole video: its length tells when it is prepared.

"""

import collections
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import ManifestError, manifest
from data.lists import DATASETS, Clip

BRACKETED = re.compile(r"\[([\w-]{11})\]$")  # yt-dlp: 'Title [ID].mp4'


def read(
    dataset: str,
    videos: str | os.PathLike,
    lists: str | os.PathLike,
    number: int = 1,
) -> manifest.Manifest:
    """The clips of a public data set that are in a folder, and those that are not.

    Args:
        dataset: a key of DATASETS.
        videos: the folder of its files, at whatever depth.
        lists: the folder of its lists under their published names, or one list.
        number: which of the published splits (ucf101) or folds (esc50: that one is the
            test), from 1.

    Raises:
        ManifestError: a list is missing or cannot be read, or no file is there.
    """
    entry, lists = DATASETS[dataset], Path(lists)
    if not 1 <= number <= entry.numbers:
        raise ManifestError(
            f"--split-number {number}: {dataset} has {entry.numbers}; give one of them."
        )
    for place in (Path(videos), lists):
        if not place.exists():
            raise ManifestError(f"{place} is not there; correct the path.")
    clips, names = entry.read(lists, number)
    clips = _each_once(clips, lists)
    files = Files(Path(videos), entry.any_case)
    rows, missing = [], []
    for clip in clips:
        row = _row(clip, files, names, entry.uncut)
        (missing if row is None else rows).append(row or _missing(clip))
    if not rows:
        raise ManifestError(
            f"{videos}: none of the {len(clips)} clips that {lists} names is there, "
            f"such as {clips[0].id}; give the folder that the files are in."
        )
    counts = collections.Counter(clip.split for clip in clips)
    listed = {split: counts[split] for split in manifest.SPLITS if counts[split]}
    return manifest.Manifest(rows, [], names, missing, listed)


def _missing(clip: Clip) -> manifest.Missing:
    return manifest.Missing(clip.id, clip.split)


def _row(clip: Clip, files: "Files", names, uncut: bool) -> manifest.Row | None:
    heads = tuple(names) if isinstance(names, dict) else ()
    facts = dict(id=clip.id, labels=clip.labels, split=clip.split, heads=heads)
    cut = _names(clip.name, clip.start, clip.end) if clip.end else ()
    if path := files.find((clip.id, *cut)):
        return manifest.Row(path, **facts)
    if path := files.find((clip.name, f"Y{clip.name}", f"video_{clip.name}")):
        perhaps_cut = clip.end is not None and not uncut
        times = dict(start=clip.start, end=clip.end, perhaps_cut=perhaps_cut)
        return manifest.Row(path, **facts, **times)
    return None


def _each_once(clips: Iterable[Clip], lists: Path) -> list[Clip]:
    """The clips by id; one that several lists name alike counts once."""
    found = {}
    for clip in clips:
        if found.setdefault(clip.id, clip) != clip:
            raise ManifestError(
                f"{lists}: names the clip {clip.id!r} twice, with other labels or in "
                f"another split ({found[clip.id].split}, {clip.split}); remove one."
            )
    if not found:
        raise ManifestError(f"{lists} names no clip; give the lists as published.")
    return list(found.values())


# ------------------------------------------------------------------------------- files


class Files:
    """The media files below a folder by their names without suffix.

    Of several with one name, one with a picture goes before sound alone, then the
    first by path.
    """

    def __init__(self, folder: Path, any_case: bool = False):
        self._folder, self._found = folder, {}
        self._key = str.lower if any_case else str
        names = manifest.media_files(folder)
        for name in sorted(names, key=lambda x: (not manifest.has_picture(x), x)):
            stem = os.path.splitext(name.rsplit("/", 1)[-1])[0]
            self._found.setdefault(self._key(stem), name)
            if bracketed := BRACKETED.search(stem):
                self._found.setdefault(bracketed[1], name)

    def find(self, names: Iterable[str]) -> Path | None:
        """The file that has the first possible of these names."""
        for name in map(self._key, names):
            if name in self._found:
                return self._folder / self._found[name]
        return None


def _names(video: str, start: float, end: float) -> Iterator[str]:
    """What people call the file of a part of a video.

    `ID_000030` (VGGSound, AudioSet), `ID_30`, `ID_30.0`, `ID_30.000`, `ID_30000` (ms),
    the same with the end (Kinetics: `ID_000030_000040`), each also with the `Y` that
    some put before ids since they may begin with a dash.
    """
    forms = ["{:06.0f}", "{:g}", "{:.1f}", "{:.3f}"]
    if start != int(start):  # six digits would name another second
        forms.remove("{:06.0f}")
    pairs = [(form.format(start), form.format(end)) for form in forms]
    pairs.append((f"{round(start * 1000)}", f"{round(end * 1000)}"))
    for name in (video, f"Y{video}", f"video_{video}"):
        for first, last in pairs:
            yield f"{name}_{first}_{last}"
            yield f"{name}_{first}"
