"""What a model must beat: linear classifiers, and trivial guesses of masked patches.

An independent yardstick in NumPy and scikit-learn; nothing of the models is used.

*Linear classifiers* know no more than pooled log-mels (`sound_features`), one frame
(`frame_features`) or both side by side; `linear_accuracy` fits and scores them.

*Predictors* guess each masked patch of a clip from the visible patches of the same clip
and modality; their error stands beside the reconstruction error of a masked
autoencoder.
"""

import warnings

import numpy as np
from jaxtyping import Float, Float32, Int, Num, UInt8
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # comes with scikit-learn

INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C
FRAME_SIDE = 32  # pixels of the one frame that a linear classifier sees

Patches = Float[np.ndarray, "b n f"]
Kept = Int[np.ndarray, "b k"]
Masked = Int[np.ndarray, "b m"]
Predictions = Float[np.ndarray, "b m f"]


def linear_accuracy(
    features_train: Num[np.ndarray, "n d"],
    labels_train: Int[np.ndarray, " n"],
    features_test: Num[np.ndarray, "p d"],
    labels_test: Int[np.ndarray, " p"],
) -> float:
    """Test accuracy (0 ... 1) of logistic regression on standardised features.

    Mean, deviation, weights and penalty come from the training clips alone: the L2
    penalty is the best of `INVERSE_PENALTIES` in 5-fold cross-validation (fewer folds
    where a class has fewer clips, and penalty C = 1e-2 where one has a single clip).
    """
    folds = min(5, int(np.unique(labels_train, return_counts=True)[1].min()))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    if folds < 2:
        search = classifier.set_params(logisticregression__C=1e-2)
    else:
        search = GridSearchCV(
            classifier,
            {"logisticregression__C": INVERSE_PENALTIES},
            cv=StratifiedKFold(folds, shuffle=True, random_state=0),
        )
    # On problems this small, threads of the linear algebra only wait for each other.
    with warnings.catch_warnings(), threadpool_limits(1):
        # A weak penalty may not converge in time; such a fit competes as it stands.
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(features_train, labels_train)
    return float(search.score(features_test, labels_test))


def sound_features(
    log_mel: Float[np.ndarray, "b t f 1"], quarters: int = 4
) -> Float32[np.ndarray, "b d"]:
    """Log-mels pooled over time: mean, deviation and the means of `quarters` parts.

    d = (2 + quarters) f. Rows that do not fill the parts are dropped from the parts.
    """
    rows = np.asarray(log_mel, np.float32)[..., 0]
    length = rows.shape[1] // quarters
    parts = [rows[:, i * length : (i + 1) * length] for i in range(quarters)]
    pooled = [rows.mean(1), rows.std(1), *(part.mean(1) for part in parts)]
    return np.concatenate(pooled, axis=1)


def frame_features(
    rgb: UInt8[np.ndarray, "b v t h w c"], side: int = FRAME_SIDE
) -> Float32[np.ndarray, "b d"]:
    """The middle frame of the first view, grey (mean of the colours), side × side.

    Each pixel is the mean of a block, so `side` must divide h and w; values 0 ... 1.
    """
    frame = rgb[:, 0, rgb.shape[2] // 2].astype(np.float32).mean(-1) / 255
    b, h, w = frame.shape
    if h % side or w % side:
        raise ValueError(f"frames of {h}×{w} have no blocks of equal size for {side}")
    blocks = frame.reshape(b, side, h // side, side, w // side)
    return blocks.mean((2, 4)).reshape(b, side * side)


def mean_visible(
    patches: Patches, kept: Kept, masked: Masked, grid: tuple[int, ...]
) -> Predictions:
    """Every masked patch as the mean of the clip's visible patches."""
    mean = _take(patches, kept).mean(1, keepdims=True)
    return np.repeat(mean, masked.shape[1], axis=1)


def nearest_in_time(
    patches: Patches, kept: Kept, masked: Masked, grid: tuple[int, ...]
) -> Predictions:
    """The visible patch at the same place that is nearest in time, the earlier of two.

    `grid` is (t, h, w) or (t, f) patches, time slowest. Where the place is never
    visible: the visible patch nearest in the whole grid (Euclidean, in patches; of
    equals, the one of smallest index).
    """
    before, after = _neighbours(kept, masked, grid)
    return _take(patches, _nearer(before, after, kept, masked, grid))


def interpolate_in_time(
    patches: Patches, kept: Kept, masked: Masked, grid: tuple[int, ...]
) -> Predictions:
    """Linear in time between the visible patches before and after at the same place.

    Before the first and after the last of them: the nearest. Where the place is never
    visible: as `nearest_in_time`.
    """
    before, after = _neighbours(kept, masked, grid)
    between = (before >= 0) & (after >= 0)
    share = np.where(between, (masked - before) / np.maximum(after - before, 1), 0)
    share = share.astype(patches.dtype)
    nearest = _nearer(before, after, kept, masked, grid)
    start = _take(patches, np.where(between, before, nearest))
    end = _take(patches, np.where(between, after, nearest))
    end -= start  # in place: these are the large arrays
    end *= share[..., None]
    return np.add(start, end, out=end)


PREDICTORS = {
    "mean of visible": mean_visible,
    "nearest in time": nearest_in_time,
    "interpolation in time": interpolate_in_time,
}


def _take(patches: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return np.take_along_axis(patches, indices[..., None], axis=1)


def _neighbours(kept, masked, grid) -> tuple[np.ndarray, np.ndarray]:
    """Token indices [b m] of the visible patch before and after, −1 for none."""
    tokens, places = int(np.prod(grid)), int(np.prod(grid[1:]))
    seen = np.full((len(kept), tokens), -1)
    np.put_along_axis(seen, kept, kept, axis=1)
    seen = seen.reshape(len(kept), grid[0], places)
    before = np.maximum.accumulate(seen, axis=1)
    # The same backwards: the smallest index from here on, `tokens` standing for none.
    ahead = np.where(seen < 0, tokens, seen)[:, ::-1]
    after = np.minimum.accumulate(ahead, axis=1)[:, ::-1]
    after = np.where(after == tokens, -1, after)
    take = lambda x: np.take_along_axis(x.reshape(len(kept), tokens), masked, axis=1)
    return take(before), take(after)


def _nearer(before, after, kept, masked, grid) -> np.ndarray:
    """The nearer of the two neighbours in time, or the nearest in the grid: [b m]."""
    tokens = int(np.prod(grid))
    gap_before = np.where(before >= 0, masked - before, tokens)
    gap_after = np.where(after >= 0, after - masked, tokens)
    nearest = np.where(gap_after < gap_before, after, before)
    for row, column in zip(*_by_row((before < 0) & (after < 0)), strict=True):
        nearest[row, column] = _nearest_in_grid(kept[row], masked[row, column], grid)
    return nearest


def _by_row(lacking: np.ndarray):
    """Rows with something lacking, and the columns of each."""
    rows = np.flatnonzero(lacking.any(1))
    return rows, [np.flatnonzero(lacking[row]) for row in rows]


def _nearest_in_grid(kept, masked, grid) -> np.ndarray:
    """For tokens `masked` [m] of one clip: the nearest of `kept` [k] in the grid."""
    kept = np.sort(kept)
    here, there = (np.stack(np.unravel_index(x, grid)) for x in (masked, kept))
    distance = ((here[:, :, None] - there[:, None]) ** 2).sum(0)
    return kept[distance.argmin(1)]
