"""The texts of an export: the model card, and the script that classifies an image."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2


def render_card(facts: Mapping[str, Any]) -> str:
    """Return the model card in Markdown.

    Args:
        facts: the contents of export.json, see `hpo.export.exporting`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpo.export"),
        autoescape=False,  # Markdown, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["quoted"] = shlex.quote
    return environment.get_template("README.md").render(facts)


def classify_script() -> str:
    """Return classify.py, which needs torch and pillow only."""
    return resources.files("hpo.export").joinpath("templates/classify.py").read_text()
