"""`moevision analyze`: what the experts of a trained model do, as one report with live views in it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path

from moevision.analysis.information import Pixels
from moevision.analysis.report import ReportSettings, analyze
from moevision.demo.facts import PictureFacts
from moevision.demo.html import flow_html
from moevision.demo.view import route_image
from moevision.errors import shown
from moevision.models.io import SavedModel


def run(chosen: Namespace) -> None:
    """Write the report, and print the three answers and what it says of each layer."""
    options = {field.name for field in fields(ReportSettings)}
    given = {name: value for name, value in vars(chosen).items() if name in options and value is not None}
    if chosen.quick:
        given = {"limit": 300, "permutations": 200} | given
    settings = ReportSettings(**given | {"out": Path(chosen.out), "seeds": tuple(chosen.seeds)})
    numbers = analyze(settings, live=live_view)
    for answer in numbers["verdict"]["answers"]:
        print(shown(answer["sentence"]))
    for layer in numbers["verdict"]["layers"]:
        print("\n".join(f"  {shown(line)}" for line in [*layer["sentences"], *layer["numbers"]]))
    print(f"The report is {shown(str(settings.out / 'report.html'))}")


def live_view(model: SavedModel, pixels: Pixels, name: str, label: str | None) -> str:
    """The explorer's opening for one image, as a frame that needs no server."""
    view = route_image(model, pixels, picture=PictureFacts(pixels, name=name, label=label))
    return flow_html(view.to_json())
