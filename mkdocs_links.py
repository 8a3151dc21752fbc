"""A hook of mkdocs: links from docs/ to what lies outside it, such as ../configs.

They work where people read Markdown in the repository. A site holds docs/ alone, so there they lead to the repository,
where mkdocs.yml names one (`repo_url`), and else become text and path. What leads nowhere is left, and fails the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    docs = Path(config.docs_dir)
    folder = (docs / page.file.src_uri).parent

    def outside(link: re.Match[str]) -> str:
        text, target, anchor = link[1], (folder / link[2]).resolve(), link[3] or ""
        if target.is_relative_to(docs) or not target.exists():
            return link[0]
        path = target.relative_to(docs.parent).as_posix()
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return text if path in text else f"{text} (`{path}`)"

    return _LINK.sub(outside, markdown)
