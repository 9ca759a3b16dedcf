"""The page of a report without its pictures, which take most of the time that a report takes."""

import html

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.report import document, page
from diffusionlm.scaling.report.content import to_json


def page_of(results, *, full=False, pictures=None):
    """Return the content of report.json, and the page with its HTML entities resolved."""
    analysis = analyse(results, full=full)
    content = to_json(analysis) | {"title": "A sweep", "context": {}, "cells": len(results), "about": document.OWN}
    return content, html.unescape(page.render(analysis, content, pictures or {}, []))
