"""The texts of an export: the model card and the script that classifies an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2


def render_card(facts: Mapping[str, Any]) -> str:
    """Return the model card in Markdown.

    Args:
        facts: the contents of export.json, see `hpo.export.exporting`.
    """
    return _environment().get_template("README.md").render(facts)


def render_script(facts: Mapping[str, Any]) -> str:
    """Return classify.py, which needs torch and pillow only."""
    return _environment().get_template("classify.py").render(facts)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("hpo.export"),
        autoescape=False,  # Markdown and Python, no HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
