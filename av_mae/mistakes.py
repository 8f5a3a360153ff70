"""Where a classifier is wrong: confusion matrix, average precision, hardest clips."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from av_mae import UserError

HARDEST = 12  # clips that are named


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a classifier said of a split: logits [n k], labels [n] or [n k], ids [n].

    classes: names of the k classes.
    """

    logits: Float[np.ndarray, "n k"]
    labels: Int[np.ndarray, " n"] | Float[np.ndarray, "n k"]
    ids: list[str]
    classes: list[str]

    @property
    def several(self) -> bool:
        """Whether a clip may have several labels."""
        return self.labels.ndim == 2

    @property
    def positive(self) -> Bool[np.ndarray, "n k"]:
        """Which classes each clip has."""
        if self.several:
            return self.labels > 0.5
        return self.labels[:, None] == np.arange(len(self.classes))

    @property
    def probabilities(self) -> Float[np.ndarray, "n k"]:
        """Softmax of the logits; where labels are several, their logistic function."""
        x = self.logits.astype(np.float64)
        if self.several:
            return 1 / (1 + np.exp(-x))
        x = np.exp(x - x.max(axis=1, keepdims=True))
        return x / x.sum(axis=1, keepdims=True)


def answers(model, dataset, batch_size: int) -> Answers:
    """What an `api.Model` says of a data set's clips, views and modalities averaged.

    Raises UserError for a model with several heads.
    """
    rows: dict[str, list] = {"logits": [], "label": [], "index": []}
    for batch in dataset.evaluate(batch_size):
        logits = model.logits(batch)
        if isinstance(logits, dict):
            raise UserError("a classifier with several heads has no one answer.")
        for name, x in (batch | {"logits": logits}).items():
            if name in rows:
                rows[name].append(np.asarray(x)[batch["valid"]])
    found = jax.tree.map(np.concatenate, rows, is_leaf=lambda x: isinstance(x, list))
    ids = [dataset.ids[i] for i in found["index"]]
    return Answers(found["logits"], found["label"], ids, list(dataset.label_names))


def confusion(found: Answers) -> Int[np.ndarray, "k k"]:
    """How many clips of class i (row) were taken for class j (column).

    Raises UserError where clips have several labels.
    """
    if found.several:
        raise UserError("a confusion matrix needs one label for each clip.")
    k = len(found.classes)
    table = np.zeros((k, k), np.int64)
    np.add.at(table, (found.labels, found.logits.argmax(axis=1)), 1)
    return table


def most_confused(table: Int[np.ndarray, "k k"], most: int) -> Int[np.ndarray, " m"]:
    """The classes, at most so many, with the most wrong answers; in their order."""
    wrong = table.sum(axis=0) + table.sum(axis=1) - 2 * np.diag(table)
    return np.sort(np.argsort(-wrong, kind="stable")[:most])


def average_precision(found: Answers) -> Float[np.ndarray, " k"]:
    """Average precision of each class (one against all), NaN without a clip of it."""
    from sklearn.metrics import average_precision_score

    scores, positive = found.probabilities, found.positive
    return np.array(
        [
            average_precision_score(positive[:, i], scores[:, i])
            if positive[:, i].any()
            else np.nan
            for i in range(len(found.classes))
        ]
    )


def hardest(found: Answers, count: int = HARDEST) -> list[dict]:
    """The clips with the largest loss: id, loss, labels, guess and its probability."""
    p = np.clip(found.probabilities, 1e-12, 1 - 1e-12)
    positive = found.positive
    if found.several:
        loss = -np.where(positive, np.log(p), np.log1p(-p)).mean(axis=1)
    else:
        loss = -np.log(p[positive])
    guess = p.argmax(axis=1)
    return [
        {
            "id": found.ids[i],
            "loss": float(loss[i]),
            "labels": [found.classes[k] for k in np.flatnonzero(positive[i])],
            "guess": found.classes[guess[i]],
            "probability": float(p[i, guess[i]]),
        }
        for i in np.argsort(-loss, kind="stable")[:count]
    ]
