"""RandAugment: a few random operations on pictures, one draw for all frames of a clip.

`config.data.randaugment` is written as in timm, 'rand-m7-n4-mstd0.5-inc1', each part
once and in any order:

| part | default | meaning                                                           |
|------|---------|-------------------------------------------------------------------|
| m    | 10      | magnitude, 0 (nothing) to 10                                      |
| n    | 2       | operations drawn, with replacement; each is done by a chance of ½ |
| mstd | 0       | deviation of the magnitude, which each operation draws anew       |
| inc  | 0       | 1: posterize, solarize, colour, contrast, brightness and sharpness|
|      |         | change a picture more the larger the magnitude; 0: from one end of|
|      |         | their range to the other                                          |

Source: Cubuk et al., 2020 (arXiv:1909.13719), with the 15 operations, ranges and
chances of timm's `rand_augment_transform`, as SlowFast and VideoMAE use it on video:
bicubic, and grey (128) where a picture is moved away. As there it sees whole frames,
before they are cropped.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from data import ConfigError

MAX_MAGNITUDE = 10.0
CHANCE = 0.5  # that a drawn operation is done
FILL = (128, 128, 128)
EXAMPLE = "rand-m7-n4-mstd0.5-inc1"


class Policy(NamedTuple):
    """What `config.data.randaugment` says."""

    magnitude: float = MAX_MAGNITUDE
    operations: int = 2
    deviation: float = 0.0
    increasing: bool = False


class Operation(NamedTuple):
    """argument: (magnitude as a share of 10, sign) → what `change` gets."""

    argument: Callable[[float, int], Any]
    change: Callable[[Image.Image, Any], Image.Image]


def parse(text: str) -> Policy | None:
    """The policy that the field `data.randaugment` asks for; None where it is ''."""
    if not text:
        return None
    first, *parts = text.split("-")
    found = [re.fullmatch(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)", part) for part in parts]
    if first != "rand" or not all(found):
        wrong = first if first != "rand" else parts[found.index(None)]
        raise _error(text, f"{wrong!r} is no part of it")
    values = {match[1]: float(match[2]) for match in found}
    if len(values) < len(parts):
        raise _error(text, "a part stands twice")
    whole = values.get("n", 1) % 1 == 0 and values.get("inc", 0) in (0, 1)
    if not whole or values.get("m", 0) > MAX_MAGNITUDE:
        raise _error(text, "m goes to 10, n is a whole number, inc is 0 or 1")
    policy = Policy()
    return Policy(
        magnitude=values.get("m", policy.magnitude),
        operations=int(values.get("n", policy.operations)),
        deviation=values.get("mstd", policy.deviation),
        increasing=bool(values.get("inc", policy.increasing)),
    )


def _error(text, what):
    return ConfigError(
        f"config.data.randaugment={text!r}: {what}; write it like {EXAMPLE!r}, or '' "
        "for none."
    )


def draw(policy: Policy, rng: np.random.Generator) -> list[tuple[str, Any]]:
    """The operations to do and their arguments, in order."""
    operations = INCREASING if policy.increasing else OPERATIONS
    names, drawn = list(operations), []
    for _ in range(policy.operations):
        name = names[int(rng.integers(len(names)))]
        done = rng.random() < CHANCE
        magnitude = rng.normal(policy.magnitude, policy.deviation)
        sign = 1 if rng.random() < 0.5 else -1
        if done:
            share = min(max(magnitude, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
            drawn.append((name, operations[name].argument(share, sign)))
    return drawn


def apply(frames: np.ndarray, drawn: list[tuple[str, Any]]) -> np.ndarray:
    """The frames, uint8 [t h w 3], after these operations, one after another."""
    if not drawn:
        return frames

    def change(frame):
        picture = Image.fromarray(frame)
        for name, argument in drawn:
            picture = OPERATIONS[name].change(picture, argument)
        return np.asarray(picture)

    return np.stack([change(frame) for frame in frames])


# --------------------------------------------------------------------------- operations


def _affine(picture, matrix):
    """Pixel (x, y) comes from (a x + b y + c, d x + e y + f)."""
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=FILL,
    )


def _rotate(picture, degrees):
    return picture.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def _brighten_dark(picture, add):
    """What is darker than 128 becomes brighter by `add`."""
    return picture.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def _posterize(picture, bits):
    """The `bits` highest bits of each value."""
    return picture.point([i & ~(2 ** (8 - bits) - 1) for i in range(256)] * 3)


def _enhance(kind):
    return lambda picture, factor: kind(picture).enhance(factor)


def _none(share, sign):
    return None


def _between(low, high):
    return lambda share, sign: low + share * (high - low)


def _either_way(high):
    return lambda share, sign: sign * share * high


OPERATIONS = {
    "AutoContrast": Operation(_none, lambda picture, _: ImageOps.autocontrast(picture)),
    "Equalize": Operation(_none, lambda picture, _: ImageOps.equalize(picture)),
    "Invert": Operation(_none, lambda picture, _: ImageOps.invert(picture)),
    "Rotate": Operation(_either_way(30.0), _rotate),  # degrees
    "Posterize": Operation(lambda share, sign: int(share * 4), _posterize),  # bits
    "Solarize": Operation(lambda share, sign: int(share * 256), ImageOps.solarize),
    "SolarizeAdd": Operation(lambda share, sign: int(share * 110), _brighten_dark),
    "Color": Operation(_between(0.1, 1.9), _enhance(ImageEnhance.Color)),
    "Contrast": Operation(_between(0.1, 1.9), _enhance(ImageEnhance.Contrast)),
    "Brightness": Operation(_between(0.1, 1.9), _enhance(ImageEnhance.Brightness)),
    "Sharpness": Operation(_between(0.1, 1.9), _enhance(ImageEnhance.Sharpness)),
    "ShearX": Operation(
        _either_way(0.3), lambda picture, x: _affine(picture, (1, x, 0, 0, 1, 0))
    ),
    "ShearY": Operation(
        _either_way(0.3), lambda picture, y: _affine(picture, (1, 0, 0, y, 1, 0))
    ),
    "TranslateX": Operation(  # shares of the width, of the height
        _either_way(0.45),
        lambda picture, x: _affine(picture, (1, 0, x * picture.width, 0, 1, 0)),
    ),
    "TranslateY": Operation(
        _either_way(0.45),
        lambda picture, y: _affine(picture, (1, 0, 0, 0, 1, y * picture.height)),
    ),
}


def _away_from_one(share, sign):
    return 1.0 + sign * share * 0.9


INCREASING = OPERATIONS | {
    name: OPERATIONS[name]._replace(argument=argument)
    for name, argument in {
        "Posterize": lambda share, sign: 4 - int(share * 4),
        "Solarize": lambda share, sign: 256 - int(share * 256),
        **dict.fromkeys(
            ("Color", "Contrast", "Brightness", "Sharpness"), _away_from_one
        ),
    }.items()
}
