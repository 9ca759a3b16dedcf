"""Jinja environments for the HTML pages and other texts of a package."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(package: str, *, autoescape: bool = True) -> Environment:
    """Return an environment for the files in `templates/` of a package, which refuses unknown variables.

    Args:
      package: the name of the package.
      autoescape: whether values are escaped for HTML.
    """
    return Environment(
        loader=PackageLoader(package),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
