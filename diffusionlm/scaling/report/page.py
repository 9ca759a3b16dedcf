"""The report as one HTML page without a network: verdict and pictures first, then warnings and tables."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from diffusionlm import templates
from diffusionlm.scaling.laws.analysis import Analysis
from diffusionlm.scaling.laws.published import PublishedLaw
from diffusionlm.scaling.report.sentences import summary
from diffusionlm.scaling.report.tables import tables


def render(
    analysis: Analysis,
    content: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    published: Sequence[PublishedLaw],
    interactive: str = "",
) -> str:
    """Return the page.

    Args:
      analysis: the fits that it shows.
      content: the content of report.json.
      pictures: PNG files by name, in their order on the page.
      published: the laws that the plots show.
      interactive: HTML with scripts of its own, as `interactive.elements` returns it; empty: the page has no scripts.
    """
    environment = templates.environment("diffusionlm.scaling.report")
    return environment.get_template("report.html.j2").render(
        title=content["title"],
        cells=content["cells"],
        about=content["about"],
        noise=any(fit.noise for fit in analysis.objectives.values()),
        verdict=content["verdict"],
        warnings=analysis.warnings,
        summary=summary(analysis),
        tables=tables(analysis, content, published),
        interactive=Markup(interactive),
        pictures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
    )
