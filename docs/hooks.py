"""What MkDocs is told beside `mkdocs.yml`."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_FORWARD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Moved</title>
<meta http-equiv="refresh" content="1; url={to}">
<script>location.replace("{to}" + location.hash)</script>
<a href="{to}">{to}</a>
"""

# Names of TeX that are read otherwise than they are spelled.
_READ_AS = {
    "approx": "≈",
    "beta": "β",
    "cdot": "·",
    "Delta": "Δ",
    "dots": "…",
    "gamma": "\N{GREEK SMALL LETTER GAMMA}",
    "ge": "≥",
    "lambda": "λ",
    "le": "≤",
    "leftarrow": "←",
    "lVert": "‖",
    "mapsto": "↦",
    "mathrm": "",
    "operatorname": "",
    "partial": "∂",
    "rho": "\N{GREEK SMALL LETTER RHO}",
    "rVert": "‖",
    "sigma": "\N{GREEK SMALL LETTER SIGMA}",
    "star": "*",
    "text": "",
    "theta": "θ",
    "times": "\N{MULTIPLICATION SIGN}",
    "top": "ᵀ",
    "varepsilon": "ε",
    "Vert": "‖",
}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the names that a page of the reference tells in place of `<!-- names: PAGE -->`."""

    def names(match: re.Match[str]) -> str:
        part = f"api/{match[1]}.md"
        text = Path(config.docs_dir, part).read_text()
        told = []
        for name, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, re.M):
            told.append(name)
            members = re.search(r"\bmembers: \[(.+)\]", options)
            if members and name.rpartition(".")[2].islower():  # of a module
                told += [f"{name}.{member}" for member in members[1].split(", ")]
        return ",\n".join(f"[`{name.rpartition('.')[2]}`]({part}#{name})" for name in told)

    return re.sub(r"<!-- names: (\w+) -->", names, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Load a picture when a reader comes near it, and keep its place until then."""
    folder = Path(config.docs_dir, page.file.src_uri).parent

    def lazy(match: re.Match[str]) -> str:
        width, height = struct.unpack(">II", (folder / match[1]).read_bytes()[16:24])  # of a PNG's header
        return f'{match[0]} loading="lazy" width="{width}" height="{height}"'

    return re.sub(r'<img alt="[^"]*" src="([^":]+\.png)"', lazy, html)


def on_post_build(config: MkDocsConfig) -> None:
    """Forward addresses that pages had as folders, and make formulas in the search readable."""
    site = Path(config.site_dir)
    for source in Path(config.docs_dir).rglob("*.md"):
        page = site / source.relative_to(config.docs_dir).with_suffix(".html")
        if not page.exists() or page.stem == "index":
            continue
        folder = page.with_suffix("")
        folder.mkdir(exist_ok=True)
        (folder / "index.html").write_text(_FORWARD.format(to=f"../{page.name}"))
    index = site / "search" / "search_index.json"
    content = json.loads(index.read_text())
    for part in content["docs"]:
        part["title"], part["text"] = without_tex(part["title"]), without_tex(part["text"])
    index.write_text(json.dumps(content, separators=(",", ":"), ensure_ascii=False))


def without_tex(text: str) -> str:
    r"""Text of the search index with `\(z^\star\)` as z*; what has a line of its own is left out.

    Results of a search are shown as they are in the index, where nothing draws formulas.
    """

    def read(match: re.Match[str]) -> str:
        spelled = re.sub(r"\\[,; ]", " ", match[1])
        named = re.sub(r"\\([A-Za-z]+) ?", lambda name: _READ_AS.get(name[1], name[1] + " "), spelled)
        return re.sub(r"[{}]|\^(?=[*ᵀ])", "", named)

    return re.sub(r"\\\((.*?)\\\)", read, re.sub(r"\\\[.*?\\\]", "", text, flags=re.S), flags=re.S)
