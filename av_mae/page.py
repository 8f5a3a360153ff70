"""The report as one HTML page: no network, every name escaped.

Style and program are in av_mae/web and are written into the page. Functions give pieces
of HTML; what they are given is text, and only text.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from av_mae import charts

MOST_CLASSES = 30  # rows of a confusion matrix; of more classes, the most confused
POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'"
)


def text(words: Any) -> str:
    """Words as HTML, also within attributes."""
    return html.escape(str(words), quote=True)


def page(title: str, sections: Mapping[str, str], lead: str = "") -> str:
    """The whole page: {heading: HTML}; empty sections are left out."""
    read = lambda name: (resources.files("av_mae") / "web" / name).read_text("utf-8")
    sections = {name: body for name, body in sections.items() if body}
    ids = {name: f"part-{i}" for i, name in enumerate(sections)}
    links = "".join(f'<a href="#{i}">{text(name)}</a> ' for name, i in ids.items())
    body = "".join(
        f'<section id="{ids[name]}" aria-labelledby="{ids[name]}-h">'
        f'<h2 id="{ids[name]}-h">{text(name)}</h2>{content}</section>'
        for name, content in sections.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{read('report.css')}</style></head><body>"
        f'<a class="skip" href="#main">to the content</a>'
        f'<header><h1>{text(title)}</h1><p class="quiet">{text(lead)}</p></header>'
        f'<nav aria-label="parts">{links}</nav><main id="main">{body}</main>'
        f"<script>{read('report.js')}</script></body></html>\n"
    )


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers are right-aligned."""
    cells = lambda row: "".join(
        f'<td class="number">{text(_number(cell))}</td>'
        if isinstance(cell, int | float) and not isinstance(cell, bool)
        else f"<td>{text(cell)}</td>"
        for cell in row
    )
    heads = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0" role="group"><table><thead><tr>{heads}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else charts.number(value)


def note(words: str) -> str:
    """A quiet sentence."""
    return f'<p class="quiet">{text(words)}</p>'


def heading(words: str) -> str:
    """A heading within a section."""
    return f"<h3>{text(words)}</h3>"


def folded(title: str, content: Any) -> str:
    """Text, or data as JSON, that opens on a click."""
    words = content if isinstance(content, str) else json.dumps(content, indent=1)
    return (
        f"<details><summary>{text(title)}</summary><pre>{text(words)}</pre></details>"
    )


def legend(runs: Sequence[str]) -> str:
    """A box for each run, which shows and hides its lines."""
    boxes = "".join(
        f'<label><input type="checkbox" checked value="{text(name)}">'
        f'<span class="swatch {charts.series_class(i)}"></span>{text(name)}</label>'
        for i, name in enumerate(runs)
    )
    return f'<fieldset class="legend"><legend>Runs</legend>{boxes}</fieldset>'


def grid(pieces: Sequence[str]) -> str:
    """Charts beside and below one another."""
    return f'<div class="charts">{"".join(pieces)}</div>' if pieces else ""


def matrix(counts: Int[np.ndarray, "k k"], classes: Sequence[str]) -> str:
    """A confusion matrix: rows are the labels, columns the answers."""
    heads = "".join(f'<th scope="col">{text(name)}</th>' for name in classes)
    rows = []
    for name, row in zip(classes, counts.tolist(), strict=True):
        whole = max(sum(row), 1)
        cells = "".join(
            f'<td class="heat" style="--v:{value / whole:.3f}">{value or ""}</td>'
            for value in row
        )
        rows.append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
    return (
        '<div class="wide" tabindex="0" role="group" aria-label="confusion matrix">'
        f'<table class="matrix"><caption>rows: label, columns: answer</caption><thead>'
        f"<tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def bars(values: Mapping[str, float], title: str) -> str:
    """Shares (0 to 1) by name, the smallest first; NaN last, as a dash."""
    order = sorted(values, key=lambda name: (np.isnan(values[name]), values[name]))
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td class="number">'
        + (
            "–</td><td></td></tr>"
            if np.isnan(values[name])
            else f"{values[name]:.3f}</td><td><span class=bar "
            f'style="--v:{values[name]:.3f}"></span></td></tr>'
        )
        for name in order
    )
    return (
        f'<h3>{text(title)}</h3><div class="wide" tabindex="0" role="group" '
        f'aria-label="{text(title)}"><table>{rows}</table></div>'
    )


# Pictures and sound within the page.


def picture(image: UInt8[np.ndarray, "h w 3"], kind: str = "jpeg") -> str:
    """A picture as an address that holds it: `jpeg` or `png`."""
    file = io.BytesIO()
    Image.fromarray(image).save(
        file, kind, **({"quality": 85} if kind == "jpeg" else {})
    )
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def sound(samples: np.ndarray, rate: int) -> str:
    """Mono int16 sound as an address that holds a WAV file."""
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.asarray(samples, "<i2").tobytes())
    return f"data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}"


def stack(versions: Sequence[np.ndarray], name: str, kind: str) -> str:
    """Three versions over one another, [t h w 3] films or [h w 3] pictures.

    kind: `frames`, of which one shows at a time, or `sound`.
    """
    films = [x if x.ndim == 4 else x[None] for x in versions]
    t, h, w, _ = films[0].shape
    images = "".join(
        f'<img alt="" src="{picture(np.concatenate(list(film), axis=1))}">'
        for film in films
    )
    width, height = (max(w, 224), h / w) if kind == "frames" else (320, 0.55)
    style = f"width:{width}px;aspect-ratio:{1 / height:.4f}"
    return (
        f'<div class="stack {kind}" role="img" aria-label="{text(name)}" '
        f'style="{style}">{images}</div>'
    )


def example(
    name: str,
    words: str,
    stacks: Sequence[str],
    sounds: Mapping[str, str],
    frames: int,
    fps: float | int,
) -> str:
    """One reconstruction: pictures with sliders, players for the sound."""
    film = ""
    if frames > 1:
        film = (
            f'<label>frame <input class="frame" type="range" min="0" value="0" step="1"'
            f' max="{frames - 1}"></label>'
            '<button type="button" aria-pressed="false">play / stop</button>'
        )
    players = "".join(
        f"<figure><figcaption>{text(label)}</figcaption>"
        f'<audio controls preload="metadata" src="{address}"></audio></figure>'
        for label, address in sounds.items()
    )
    return (
        f'<div class="example" data-fps="{fps:g}"><h3>{text(name)}</h3>{note(words)}'
        f'<div class="pair">{"".join(stacks)}</div><div class="controls">'
        '<label>original, masked, reconstruction <input class="version" type="range" '
        'min="0" max="2" step="0.05" value="2"></label><div class="ends" aria-hidden='
        f'"true"><span>original</span><span>masked</span><span>reconstruction</span>'
        f'</div>{film}</div><div class="players">{players}</div></div>'
    )
