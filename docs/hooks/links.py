"""mkdocs: links from a page to files outside `docs/` become the names of these files, which the site does not have."""

import pathlib
import re
from typing import Any

_ROOT = pathlib.Path(__file__).parents[2]


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The page with such links replaced.

    Raises:
      FileNotFoundError: for a link to a file that the repository does not have.
    """
    del config, files
    here = (_ROOT / "docs" / page.file.src_path).parent

    def replaced(match: re.Match[str]) -> str:
        text, target = match[1], (here / match[2].partition("#")[0]).resolve()
        if target.is_relative_to(_ROOT / "docs"):
            return match[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_path} links to {match[2]}, which does not exist.")
        name = str(target.relative_to(_ROOT))
        return text if text.strip("`") == name else f"{text} (`{name}`)"

    return re.sub(r"\[([^\]]*)\]\((\.\./[^)\s]+)\)", replaced, markdown)
