"""The page: names stay text, nothing comes from elsewhere, sliders and keys work."""

import base64
import io
import re
import wave

import chromium
import numpy as np
import pytest
from PIL import Image

from av_mae import charts, page

EVIL = '<img src=x onerror="document.title=1">&\'"'


def films(t: int = 3):
    """Original black, masked grey, reconstruction white."""
    return [np.full((t, 8, 8, 3), level, np.uint8) for level in (0, 128, 255)]


@pytest.fixture
def whole() -> str:
    """A page with everything, in which each name is an attack."""
    sounds = {EVIL: page.sound(np.zeros(160, np.int16), 16000)}
    stacks = [
        page.stack(films(), EVIL, "frames"),
        page.stack([x[0] for x in films()], EVIL, "sound"),
    ]
    lines = charts.lines(EVIL, {EVIL: [(0, 1), (1, 2)], "other": [(0, 2), (1, 1)]})
    body = page.example(EVIL, EVIL, stacks, sounds, 3, 5.0)
    body += page.matrix(np.eye(2, dtype=np.int64), [EVIL, "b"])
    body += page.bars({EVIL: 0.5, "none": float("nan")}, EVIL)
    body += page.table([EVIL], [[EVIL, 0.5, 3]]) + page.folded(EVIL, {EVIL: EVIL})
    body += page.legend([EVIL, "other"]) + page.grid([lines]) + page.note(EVIL)
    wide = page.table([f"column {i}" for i in range(40)], [list(range(40))])
    return page.page(EVIL, {EVIL: body, "empty": "", "wide": wide}, EVIL)


def test_names_are_text_everywhere(whole):
    assert "<img src=x" not in whole and 'onerror="' not in whole
    assert whole.count("&lt;img src=x onerror=") >= 12
    assert ">empty<" not in whole


def test_the_page_asks_nothing_of_the_network(whole):
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)\"", whole)
    assert addresses and all(a.startswith(("data:", "#")) for a in addresses)
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|http-equiv", "", whole)


def test_pictures_and_sound_are_within_the_page():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 6, 3)).astype(np.uint8)
    head, data = page.picture(image, "png").split(",")
    assert head == "data:image/png;base64"
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(found, image)
    samples = np.array([0, 1, -32768, 32767], np.int16)
    data = page.sound(samples, 16000).split(",")[1]
    with wave.open(io.BytesIO(base64.b64decode(data))) as file:
        assert file.getframerate() == 16000 and file.getnchannels() == 1
        np.testing.assert_array_equal(
            np.frombuffer(file.readframes(9), np.int16), samples
        )


def test_bars_show_the_worst_first_and_nan_last():
    text = page.bars({"good": 0.9, "none": float("nan"), "bad": 0.1}, "t")
    assert re.findall(r'scope="row">(\w+)<', text) == ["bad", "good", "none"]


@chromium.needed
def test_in_chromium_nothing_attacks_and_sliders_work(whole, tmp_path):
    program = """
      const version = document.querySelector('.version');
      const opacities = () =>
        [...document.querySelectorAll('.stack.frames img')].map(i => i.style.opacity);
      const set = (x, v) => {x.value = v; x.dispatchEvent(new Event('input'))};
      const found = {title: document.title, end: opacities()};
      set(version, 0); found.original = opacities();
      set(version, 0.5); found.between = opacities();
      found.says = version.getAttribute('aria-valuetext');
      const frame = document.querySelector('.frame');
      set(frame, 2);
      found.left = document.querySelector('.stack.frames img').style.left;
      const box = document.querySelector('.legend input');
      box.click();
      found.lines = [...document.querySelectorAll('[data-run]')]
        .map(x => getComputedStyle(x).display);
      const reachable = [...document.querySelectorAll('input,button,summary,a,audio')];
      found.keys = reachable.every(x => x.tabIndex >= 0) && reachable.length;
      found.images = document.querySelectorAll('img').length;
      return found;
    """
    found = chromium.after(whole, program, tmp_path)
    assert found["title"] == EVIL
    assert found["end"] == ["1", "1", "1"] and found["original"] == ["1", "0", "0"]
    assert found["between"] == ["1", "0.5", "0"] and found["left"] == "-200%"
    assert found["says"] in ("original", "masked")
    assert found["lines"] == ["none", "inline"]
    assert found["keys"] >= 7 and found["images"] == 6  # and none of EVIL's


@chromium.needed
def test_in_chromium_it_fits_a_phone_dark_and_light(whole, tmp_path):
    program = """
      const style = getComputedStyle(document.body);
      const light = x => x.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0);
      return {wide: document.documentElement.scrollWidth, window: innerWidth,
              ground: light(style.backgroundColor), ink: light(style.color)};
    """
    grounds = []
    for scheme in (0, 1):  # Blink's names: dark, light
        options = (
            "--window-size=390,800",
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        found = chromium.after(whole, program, tmp_path, *options)
        assert found["wide"] <= found["window"] <= 500
        assert abs(found["ground"] - found["ink"]) > 400
        grounds.append(found["ground"])
    assert grounds[0] < 150 < 600 < grounds[1]
