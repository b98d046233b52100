"""What the pages of `analyze` and `data score` share: templates that escape what comes from outside, and numbers.

Templates and their style sheet lie beside the modules that fill them, and are named from `moevision/analysis` on.
"""

from __future__ import annotations

import json

import jinja2
from markupsafe import Markup

from moevision.names import shown


def environment() -> jinja2.Environment:
    """Templates with autoescape: an unknown name is an error, and names from outside are shown harmless."""
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("moevision.analysis", "."),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else shown(str(value)),  # names from outside
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"number": number}
    return page


def number(value: float | int | None, form: str = ",") -> Markup:
    """A number rounded by a format such as `.2f`, with a true minus sign; an en dash where there is none.

    It carries its exact value, as `report.json` has it, in HTML's own element for that: `<data value="0.0123">`.
    """
    if value is None:
        return Markup('<span class="soft">–</span>')
    text = format(value, form).replace("-", "−")
    if set(text) <= set("−+0.%"):
        text = text.replace("−", "").replace("+", "")  # −0.00 would look like a direction
    return Markup('<data value="{}">{}</data>').format(json.dumps(value), text)
