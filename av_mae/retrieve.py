"""How well sound finds its picture and picture its sound, by their features.

    python -m av_mae.retrieve runs/pretrain
    python -m av_mae.retrieve runs/pretrain --test validation --centre
    python -m av_mae.retrieve --features picture.npz sound.npz

Of all clips of the test split that have both, those of the other modality are ranked by
cosine similarity: R@1, R@5 and R@10 say how often the clip's own is among the first,
median rank is where it stands (1 is best). Chance is printed beside them. `--centre`
first takes from the features their mean over the split, each modality's own: where the
two lie far apart (Liang et al. 2022, "Mind the gap"), direction says nothing without.
Files are two of `python -m av_mae.extract`, with `--modalities rgb` and with
`--modalities spectrogram`: neither may know of the other.
"""

import json
import sys

import numpy as np
from jaxtyping import Float, Int

from av_mae import UserError, commandline, featureset, knn
from av_mae.featureset import FeatureSet, chunks, unit
from data import DataError

BEST = (1, 5, 10)
AUDIO_TO_VIDEO, VIDEO_TO_AUDIO = "audio → video", "video → audio"


def ranks(
    queries: Float[np.ndarray, "n d"], found: Float[np.ndarray, "n d"]
) -> Int[np.ndarray, " n"]:
    """The place, from 1, of row i of `found` among all of them for query i.

    Equally near ones stand before it, so that features that say nothing find nothing.
    """
    queries, found = unit(queries), unit(found)
    places = []
    for part in chunks(len(queries)):
        # In float64 a row's own cosine is the same alone and in the table.
        cosine = queries[part].astype(np.float64) @ found.T.astype(np.float64)
        own = cosine[np.arange(len(cosine)), np.arange(len(queries))[part]]
        places.append((cosine >= own[:, None]).sum(axis=1))
    return np.concatenate(places)


def evaluate(clips: FeatureSet, centre: bool = False) -> dict[str, dict[str, float]]:
    """{direction: {"R@1", "R@5", "R@10", "median_rank", "clips"}}, and of chance.

    Raises UserError where no clips have both modalities, or their widths differ.
    """
    missing = {"rgb", "spectrogram"} - set(clips.features)
    if missing:
        raise UserError(f"there are no features of {missing.pop()}: both are needed.")
    both = clips.has["rgb"] & clips.has["spectrogram"]
    video, audio = (clips.features[m][both] for m in ("rgb", "spectrogram"))
    if not both.any():
        raise UserError("no clip has both picture and sound.")
    if video.shape[1] != audio.shape[1]:
        raise UserError(
            f"features of rgb have {video.shape[1]} values, those of spectrogram "
            f"{audio.shape[1]}: they cannot be compared."
        )
    if centre:
        video, audio = (x - x.mean(axis=0) for x in (video, audio))
    n = int(both.sum())
    results = {
        AUDIO_TO_VIDEO: numbers(ranks(audio, video)),
        VIDEO_TO_AUDIO: numbers(ranks(video, audio)),
        "chance": {f"R@{k}": min(1.0, k / n) for k in BEST}
        | {"median_rank": (n + 1) / 2},
    }
    return {name: row | {"clips": n} for name, row in results.items()}


def numbers(places: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Recall at 1, 5, 10 and the median of ranks that begin with 1."""
    recall = {f"R@{k}": float(np.mean(places <= k)) for k in BEST}
    return recall | {"median_rank": float(np.median(places))}


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| | R@1 | R@5 | R@10 | median rank | clips |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        cells = [f"{row[f'R@{k}']:.1%}" for k in BEST]
        cells += [f"{row['median_rank']:g}", str(row["clips"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = knn.parser_of("retrieve", __doc__, ("test",))
    parser.add_argument("--centre", action="store_true", help="take the means away")
    given = parser.parse_args(argv)
    commandline.quiet_libraries()
    try:
        clips = knn.sets(given, ("test",), "none")
        clips = featureset.paired(*clips) if len(clips) == 2 else clips[0]
        results = evaluate(clips, given.centre)
    except (UserError, DataError) as error:
        commandline.stop(error)
    print(json.dumps(results) if given.json else table(results))


if __name__ == "__main__":
    sys.exit(main())
