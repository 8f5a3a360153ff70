"""Writes docs/licences.md: what is installed with av_mae, and under which licence.

    python docs/licences.py

Follows requirements.txt to everything that it brings along, in the environment that
runs this; licences are what the packages' own metadata say. Of the extras only what
pyproject.toml names is listed.
"""

import argparse
import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

TEXT = """# Licences of the dependencies

Written by `python docs/licences.py`: requirements.txt (in bold) and all that it brings
along, with the licences that the packages' metadata name. av_mae itself is under
Apache-2.0.

| package | version | licence |
|---|---|---|
{rows}

Extras (`pip install -e ".[serve]"`), without what they bring along:

| extra | package | licence |
|---|---|---|
{extras}

The extra `demo` brings espeak-ng under GPL-3.0, which is loaded at run time and not
distributed.

Known weaknesses of what is installed:

    pip install pip-audit && pip-audit

It asks the package registry's advisory database; run it before a release, and after
`pip install --upgrade -r requirements.txt`, which `make test-newest` tries too.
"""


def required() -> list[str]:
    """The names of requirements.txt, as far as they hold on this machine."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(x) for x in lines if x.strip() and not x.startswith("#")]
    return [canonicalize_name(x.name) for x in found if holds(x)]


def holds(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def closure(names: list[str]) -> list[str]:
    """These packages and all that they require, sorted."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if holds(requirement):
                waiting.append(canonicalize_name(requirement.name))
    return sorted(found)


def licence(name: str) -> str:
    """The licence expression, else the classifiers' names, else the free text."""
    about = metadata.metadata(name)
    if about.get("License-Expression"):
        return about["License-Expression"]
    kinds = [x for x in about.get_all("Classifier") or () if x.startswith("License ::")]
    kinds = [x.rsplit(" :: ", 1)[-1] for x in kinds]
    kinds = [x for x in kinds if x != "OSI Approved"]
    if kinds:
        return ", ".join(kinds)
    text = (about.get("License") or "").strip().splitlines()
    return re.sub(r"[|*]", "", text[0])[:60] if text else "not told"


# As their registry pages say, for those that are not installed where this runs.
TOLD = {
    "apache-beam": "Apache-2.0",
    "gradio": "Apache-2.0",
    "torch": "BSD-3-Clause",
    "transformers": "Apache-2.0",
}


def extras() -> list[tuple[str, str]]:
    """(extra, package) of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = tomllib.loads(text)["project"]["optional-dependencies"]
    return [
        (extra, canonicalize_name(Requirement(line).name))
        for extra, lines in named.items()
        for line in lines
    ]


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    ours, rows = required(), []
    for name in closure(ours):
        shown = f"**{name}**" if name in ours else name
        rows.append(f"| {shown} | {metadata.version(name)} | {licence(name)} |")
    more = [
        f"| {extra} | {name} | {TOLD.get(name) or licence(name)} |"
        for extra, name in extras()
    ]
    text = TEXT.format(rows="\n".join(rows), extras="\n".join(more))
    (ROOT / "docs" / "licences.md").write_text(text, encoding="utf-8")
    print(f"docs/licences.md: {len(rows)} packages")


if __name__ == "__main__":
    main()
