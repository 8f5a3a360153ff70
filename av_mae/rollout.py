"""Attention as maps: which places an encoder's output comes from.

Attention roll-out (Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL
2020): attention is averaged over the heads, half of it is the residual connection, and
the layers' matrices are multiplied. Here one matrix a layer goes over the tokens of all
modalities, and over the bottleneck tokens where there are some; in layers where the
modalities do not meet it has blocks of zeros.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from av_mae.representation import Place


class Nodes(NamedTuple):
    """The tokens of all modalities, one after another, then the bottleneck tokens.

    counts: {m: how many, its CLS token first}; bottlenecks: how many; used: which
    modalities the clip has.
    """

    counts: Mapping[str, int]
    bottlenecks: int
    used: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many there are."""
        return sum(self.counts.values()) + self.bottlenecks

    def part(self, m: str) -> slice:
        """Those of a modality."""
        names = list(self.counts)
        start = sum(self.counts[x] for x in names[: names.index(m)])
        return slice(start, start + self.counts[m])

    def last(self) -> slice:
        """The bottleneck tokens."""
        return slice(self.size - self.bottlenecks, self.size)


def attention_weights(
    qkv: Float[np.ndarray, "n 3 heads e"], exist: np.ndarray | None = None
) -> Float[np.ndarray, "n n"]:
    """How much each token (row) attends to each (column), the mean over the heads.

    exist: bool [n], which tokens may be attended to.
    """
    q, k, _ = np.moveaxis(np.asarray(qkv, np.float32), 1, 0)  # n heads e
    n, heads, width = q.shape
    total = np.zeros((n, n), np.float32)
    for head in range(heads):  # one at a time: all of them may take much memory
        scores = q[:, head] @ k[:, head].T / np.sqrt(width)
        if exist is not None:
            scores = np.where(exist[None], scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        total += scores / scores.sum(axis=1, keepdims=True)
    return total / heads


def layer_matrix(
    nodes: Nodes, places: Mapping[str, Place], calls: Mapping[str, np.ndarray]
) -> Float[np.ndarray, "n n"]:
    """One layer's attention over all nodes; rows sum to 1.

    places[m], calls[m]: where the tokens of m are, and the block's qkv [n 3 heads e].
    Bottleneck tokens are the mean of the copies that the modalities make of them; where
    they take no part, and for modalities that the clip lacks, rows are the identity.
    """
    matrix = np.eye(nodes.size, dtype=np.float32)
    last, copies = nodes.last(), []
    for m in nodes.used:
        where, qkv, own = places[m], calls[m], nodes.part(m)
        if where.joint:
            matrix[own] = 0
            exist = np.zeros(nodes.size - nodes.bottlenecks, bool)
            for other in nodes.used:
                exist[nodes.part(other)] = True
            weights = attention_weights(qkv, exist)
            matrix[own, : len(exist)] = weights[own]
            continue
        weights, n = attention_weights(qkv), nodes.counts[m]
        matrix[own] = 0
        matrix[own, own] = weights[:n, :n]
        if where.bottlenecks:
            matrix[own, last] = weights[:n, n:]
            rows = np.zeros((where.bottlenecks, nodes.size), np.float32)
            rows[:, own], rows[:, last] = weights[n:, :n], weights[n:, n:]
            copies.append(rows)
    if copies:
        matrix[last] = np.mean(copies, axis=0)
    return matrix


def rollout(
    matrices: Sequence[Float[np.ndarray, "n n"]], output: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """What share of a weighted mean of the output tokens comes from each input token.

    output: its weights, sum 1; so has the result.
    """
    found = np.asarray(output, np.float32)
    for matrix in reversed(matrices):
        found = 0.5 * (found @ matrix + found)
    return found
