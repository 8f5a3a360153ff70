"""Headless Chromium, where it is installed: what a page is after its program has run.

The environment variable CHROMIUM names the program, if it is not on the path.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
PROGRAM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), "")
needed = pytest.mark.skipif(
    not PROGRAM, reason=f"none of {', '.join(NAMES)} is installed (or set CHROMIUM)"
)


def after(page: str, program: str, folder: Path, *options: str):
    """What `program` (the body of a JavaScript function) returns, run in the page."""
    probe = (
        "<script>addEventListener('load',()=>{const out=document.createElement('pre');"
        f"out.id='probe';out.textContent=JSON.stringify((()=>{{{program}}})());"
        "document.body.append(out)})</script>"
    )
    (folder / "page.html").write_text(page.replace("</body>", probe + "</body>"))
    command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", *options]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [*command, "--dump-dom", (folder / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr
    return json.loads(html.unescape(found[1]))
