"""What MkDocs is told beside `mkdocs.yml`."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

_FORWARD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Moved</title>
<meta http-equiv="refresh" content="1; url={to}">
<script>location.replace("{to}" + location.hash)</script>
<a href="{to}">{to}</a>
"""


def on_post_build(config: MkDocsConfig) -> None:
    """Forward `quickstart/` to `quickstart.html`: pages keep the addresses that they had as folders."""
    site = Path(config.site_dir)
    for source in Path(config.docs_dir).rglob("*.md"):
        page = site / source.relative_to(config.docs_dir).with_suffix(".html")
        if not page.exists() or page.stem == "index":
            continue
        folder = page.with_suffix("")
        folder.mkdir(exist_ok=True)
        (folder / "index.html").write_text(_FORWARD.format(to=f"../{page.name}"))
