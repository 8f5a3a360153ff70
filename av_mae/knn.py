"""How good features are, without training: top-1 of a k-nearest-neighbour classifier.

    python -m av_mae.knn runs/pretrain
    python -m av_mae.knn runs/pretrain --data datasets/ucf101 --k 10 --layer -2
    python -m av_mae.knn --features train.safetensors test.safetensors

A clip of the test split gets the class for which its k nearest clips of the training
split vote, by the published protocol: cosine similarity s, k = 20, and votes that weigh
exp(s / 0.07) (Wu et al. 2018, "Unsupervised feature learning via non-parametric
instance discrimination", 3.4; DINO's evaluation, Caron et al. 2021). Each modality is
judged alone, and both together. Files are those of `python -m av_mae.extract`, as it
made them: there an encoder in which modalities meet has let each know of the other.
"""

import argparse
import json
import sys

import numpy as np
from jaxtyping import Float, Int

from av_mae import UserError, api, caveats, commandline, datasets, featureset
from av_mae.featureset import FeatureSet, chunks, unit
from data import DataError


def scores(
    train: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[np.ndarray, "m classes"]:
    """The weights of the votes for each class: exp(cosine / temperature) of k clips.

    k: at most n count. Of equally near clips the earlier in `train` count.
    """
    train, test, k = unit(train), unit(test), min(k, len(train))
    votes = np.zeros((len(test), classes), np.float32)
    for part in chunks(len(test)):
        cosine = test[part] @ train.T
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        # Less the largest cosine there can be: only the votes' proportions count.
        weights = np.exp((np.take_along_axis(cosine, nearest, 1) - 1) / temperature)
        rows = np.arange(len(cosine))[:, None]
        np.add.at(votes[part], (rows, labels[nearest]), weights)
    return votes


def evaluate(
    train: FeatureSet, test: FeatureSet, k: int = 20, temperature: float = 0.07
) -> dict[str, dict[str, float]]:
    """{modalities: {"top_1", "top_5" (of more than five classes), "clips"}}.

    Only clips count that have the modality. Raises UserError for clips without labels.
    """
    if train.labels is None or test.labels is None:
        raise UserError("the clips have no labels, which k-NN needs.")
    if train.labels.ndim != 1 or test.labels.ndim != 1:
        raise UserError("the clips have several labels each; k-NN takes one of a clip.")
    if train.classes != test.classes:
        raise UserError("the classes of the two sets are not the same.")
    results = {}
    for name in [name for name in train.features if name in test.features]:
        ours, theirs = train.has[name], test.has[name]
        if not ours.any() or not theirs.any():
            continue
        found = scores(
            *(train.features[name][ours], train.labels[ours]),
            test.features[name][theirs],
            len(train.classes),
            *(k, temperature),
        )
        order = np.argsort(-found, axis=1, kind="stable")
        right = order == test.labels[theirs][:, None]
        results[name] = {"top_1": float(right[:, :1].any(axis=1).mean())}
        if len(train.classes) > 5:
            results[name]["top_5"] = float(right[:, :5].any(axis=1).mean())
        results[name]["clips"] = int(theirs.sum())
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown table."""
    metrics = [name for name in next(iter(results.values()), {}) if name != "clips"]
    lines = [f"| | {' | '.join(metrics)} | test clips |", "|---" * (len(metrics) + 2)]
    lines[1] += "|"
    for name, row in results.items():
        cells = [f"{row[metric]:.1%}" for metric in metrics]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['clips']} |")
    return "\n".join(lines)


def parser_of(name: str, doc: str, splits: tuple[str, ...]) -> argparse.ArgumentParser:
    """The options that commands on features have in common."""
    parser = argparse.ArgumentParser(
        prog=f"python -m av_mae.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", nargs="?", help="a workdir, a step, or a file")
    parser.add_argument("--data", default="", help="a data set; default: the run's")
    for split in splits:
        parser.add_argument(f"--{split}", default=split, help="name of the split")
    parser.add_argument("--layer", type=int, default=-1, help="of the encoder")
    parser.add_argument("--pool", default="mean", choices=("mean", "cls"))
    parser.add_argument("--weights", default="params", choices=("params", "ema"))
    parser.add_argument("--features", nargs=2, metavar="FILE", help="see above")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def sets(given, splits: tuple[str, ...], label: str) -> list[FeatureSet]:
    """The feature sets that the options of `parser_of` name."""
    if bool(given.features) == bool(given.checkpoint):
        raise UserError("give a checkpoint, or --features with two files.")
    if given.features:
        return featureset.read(*given.features)
    model = api.load(given.checkpoint, given.weights)
    if given.data:
        model.config.data.dir = given.data
    found = []
    for split in splits:
        name = getattr(given, split)
        dataset = datasets.split(model.config, name, label)
        said = [*model.caveats, *caveats.of_data(model.config, dataset, name)]
        if said:
            words = caveats.text(list(dict.fromkeys(said)))
            print(f"{name}:{words}", file=sys.stderr)
        size = model.config.eval.batch_size
        found.append(featureset.compute(model, dataset, size, given.layer, given.pool))
    return found


def main(argv=None):
    parser = parser_of("knn", __doc__, ("train", "test"))
    parser.add_argument("--k", type=int, default=20, help="neighbours that vote")
    parser.add_argument("--temperature", type=float, default=0.07)
    given = parser.parse_args(argv)
    commandline.quiet_libraries()
    try:
        train, test = sets(given, ("train", "test"), "class")
        results = evaluate(train, test, given.k, given.temperature)
    except (UserError, DataError) as error:
        commandline.stop(error)
    print(json.dumps(results) if given.json else table(results))


if __name__ == "__main__":
    sys.exit(main())
