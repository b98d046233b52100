"""The first part of the explorer as a Gradio app, to be launched or to be placed in somebody's Blocks.

    from moevision.demo import blocks

    blocks().launch()                       # the bundled models, as `python app.py` shows them
    with gr.Blocks() as mine:
        blocks("runs/pets").render()        # one's own, among other things

`moevision demo` serves the whole page. Here one gives an image, a model and experts to take away, and gets the answer
and the flow of the patches.

Gradio's own preprocessing is off: it would decode a visitor's image without our limits, and open any file of the
computer that a request names. `uploaded_image` takes its place.
"""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from moevision.data.images import BadImageError, read_image
from moevision.demo import requests as fields
from moevision.demo.examples import sharp_data_uri, thumbnail_uri
from moevision.demo.facts import SHARP_PX
from moevision.demo.html import flow_html, links, sorting_html
from moevision.demo.models import Entry, open_entries
from moevision.demo.service import error_json
from moevision.demo.view import Settings, route_image
from moevision.demo.wire import MAX_BYTES, RequestError, open_data_uri, open_upload
from moevision.errors import UserError
from moevision.types import Json, Pixels

if TYPE_CHECKING:
    import gradio as gr

NUM_EXAMPLES = 3  # of a model
DELETE_CACHE_S = (600, 3600)  # every ten minutes Gradio deletes uploads older than an hour
TITLE = "See inside a Mixture of Experts"
LEAD = "Experts share one photo. Which of them computes each patch, and what if some were away?"
# One image at a time: direct requests to /run pass by Gradio's queue and its limit of concurrent calls.
_DECODE_LOCK = threading.Lock()


def blocks(model: str | None = None, data: str | None = None) -> gr.Blocks:
    """A Gradio app: an image and a model in, the likeliest classes and the flow of the patches out.

    Its endpoint is `route(image, model, away) -> label, view, routing`. A UserError if there is no such model, or no
    experts.

    In Blocks of your own, Gradio deletes uploads only if those have a `delete_cache`; `launch(max_file_size="8mb")`
    refuses larger files before they are stored.

    Args:
        model: a run folder, its model, or a timm address; the bundled models if None.
        data: images to choose from, as `moevision demo --data` takes them.
    """
    import gradio as gr

    entries = open_entries(model, data)
    # First the model that routes whole photos: cats to one expert, dogs to the other.
    entries.sort(key=lambda entry: entry.card.sorting is None)
    routing_app = RoutingApp({entry.card.title: entry for entry in entries})
    first, answered = routing_app.first()
    titles = list(routing_app.entries)
    app: gr.Blocks
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=DELETE_CACHE_S
    ) as app:
        gr.Markdown(f"# {TITLE}\n{LEAD} {full_explorer_link()}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(
                    first.image,
                    type="filepath",
                    format="png",  # lossless: an example is routed as `moevision demo` routes it
                    image_mode=None,
                    label="Your photo",
                    height=240,
                )
                label = gr.Label(answered.classes, num_top_classes=5, label="The model says")
                choice = gr.Dropdown(
                    titles, value=titles[0], label="Model", visible=len(titles) > 1
                )
                expert_choice = partial(gr.Dropdown, value=[], multiselect=True, label="Take away")
                ablated = expert_choice(routing_app.experts_of(titles[0]))
                # Gradio checks what a program sends against the choices of a dropdown: a hidden one has all models'.
                all_experts = dict.fromkeys(
                    name for title in titles for name in routing_app.experts_of(title)
                )
                away = expert_choice(list(all_experts), visible=False)
                routing = gr.JSON(label="The experts of each patch", visible=False)
            with gr.Column(scale=3, min_width=320):
                view = gr.HTML(answered.view, label="The flow of the patches")
                samples = [[row.image, row.model] for row in routing_app.rows]
                gr.Examples(samples, [image, choice], label="Examples")

        routing_app.listen([image, choice, ablated], [image, choice, away], [label, view, routing])
    return app


class RoutingApp:
    """Models, examples, and what answers an event of the page or a program's request."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries  # by title
        self.rows = examples(entries)
        # Pixels of examples as `moevision demo` gives them to the model, by model and bytes of the image.
        self.example_pixels = {(row.model, row.image.tobytes()): row.pixels for row in self.rows}

    def first(self) -> tuple[Example, Answer]:
        """What is shown at first, answered when the app is built: within other Blocks no event opens a page."""
        title = next(iter(self.entries))
        shown = next(iter(self.rows), Example(None, title, None))
        return shown, self.route(shown.image, shown.model, [])

    def experts_of(self, title: str) -> list[str]:
        """The names of a model's experts."""
        return list(experts(self.entries[title]))

    def listen(self, shown: list[Any], sent: list[Any], outputs: list[Any]) -> None:
        """Answer the page's image, model and experts as they change, and those that a program sends."""
        import gradio as gr

        image, choice, ablated = shown
        choice.change(
            lambda title: gr.Dropdown(self.experts_of(title), value=[]),
            choice,
            ablated,
            api_visibility="private",
        )
        on = partial(gr.on, preprocess=False, concurrency_id="route")
        changes = [image.change, ablated.change]
        on(changes, self.answer_page, shown, outputs[:2], api_visibility="private")
        # No event: for programs alone.
        on([], self.answer_program, sent, outputs, api_name="route")

    def answer_page(self, image: Any, model: Any, away: Any) -> tuple[Any, str]:
        """What the page shows, without experts that are still chosen of the model before."""
        if isinstance(model, str) and model in self.entries and isinstance(away, list):
            names = self.experts_of(model)
            away = [name for name in away if name in names]
        classes, view, _ = self.answer_program(image, model, away)
        return classes, view

    def answer_program(self, image: Any, model: Any, away: Any) -> Answer:
        """Route an image: the likeliest classes, the flow of its patches as HTML, and the experts of each patch.

        `model` is one of the titles. `away` names experts to take away, such as "L9·E3" or "L9.E3". An image that
        can't be used, and an expert that the model doesn't have, are errors that say so.
        """
        import gradio as gr

        try:
            title = fields.choice({"model": model}, "model", tuple(self.entries))
            photo = uploaded_image(image, self.entries[title].facts.image_size)
            return self.route(photo, title, away or [])
        except UserError as error:
            message = error_json(error, "route")["error"]
            raise gr.Error(message, print_exception=False) from error

    def route(self, image: Image.Image | None, model: str, away: list[str]) -> Answer:
        """What the model of a title says about an image; a RequestError names an expert that it doesn't have."""
        entry = self.entries[model]
        trained = entry.variants["trained"]
        ablated = fields.ablated_experts(_expert_indices(entry, away), trained.facts)
        if image is None:
            return Answer(None, "", None)

        pixels = self.example_pixels.get((model, image.tobytes()))
        model_input = image if pixels is None else pixels
        settings = Settings(ablated_experts=ablated)
        view = route_image(
            trained.saved, model_input, settings=settings, facts=trained.facts
        ).to_json()
        view["picture"]["name"] = "your photo"
        view["picture"]["sharp"] = sharp_data_uri(
            image, trained.saved.image_size, trained.saved.framing
        )
        layers = [
            {name: layer[name] for name in ("name", "experts", "weights")}
            for layer in view["layers"]
        ]
        return Answer(
            classes={row["class"]: row["p"] for row in view["prediction"]["moe"]},
            view=flow_of(entry, view),
            routing={"grid": list(trained.facts.grid), "layers": layers},
        )


class Answer(NamedTuple):
    """What is said about an image; empty without one."""

    classes: dict[str, float] | None  # the likeliest ones with their probabilities
    view: str  # the flow of the patches as HTML
    # `grid` of patches, and of each of the `layers` the `experts` and `weights` of each patch
    routing: Json | None


class Example(NamedTuple):
    """An image to choose."""

    image: Any  # at its full size
    model: str  # its title
    pixels: Pixels | None  # as `moevision demo` gives them to the model


def full_explorer_link() -> str:
    """Where the rest of the explorer is."""
    live = links()["live"]
    if live:
        return f"[The whole explorer]({live})."
    return "The whole explorer: `moevision demo`."


def uploaded_image(sent: Any, image_size: int) -> Image.Image | None:
    """The image of a request, upright RGB: a file that this server has stored, or a data URI; None without one.

    A request may name any other file, too, or an address: that is a `BadImageError`, and nothing is opened.
    """
    from gradio.utils import get_upload_folder

    if not sent:
        return None
    side = max(SHARP_PX, image_size)
    url = sent.get("url")
    if isinstance(url, str) and url.startswith("data:"):
        with _DECODE_LOCK:
            return open_data_uri(url, side)
    try:
        file = Path(sent.get("path") or "").resolve(strict=True)
        uploaded = file.is_relative_to(Path(get_upload_folder()).resolve())
    except (OSError, ValueError):  # there is none; a NUL in the name
        uploaded = False
    if not uploaded:
        raise BadImageError(
            "<upload>", "its file is not, or no longer, among the uploaded ones; choose it again"
        )
    with _DECODE_LOCK:
        return open_upload(read_image(file, max_bytes=MAX_BYTES), side)


def _expert_indices(entry: Entry, names: Any) -> list[list[int]]:
    """[layer, expert] of each name, such as "L9·E3" or "L9.E3"."""
    pairs = experts(entry)
    if not isinstance(names, list):
        raise RequestError(
            f"Experts to take away are a list of names such as {next(iter(pairs))!r}."
        )
    chosen = []
    for name in names:
        pair = pairs.get(str(name).replace(".", "·"))
        if pair is None:
            ranges = [
                f"{layer.name}·E0 to {layer.name}·E{layer.num_experts - 1}"
                for layer in entry.facts.routers
            ]
            raise RequestError(
                f"There is no expert {str(name)[:40]!r} in {entry.card.title}: its experts are {', '.join(ranges)}."
            )
        chosen.append(pair)
    return chosen


def flow_of(entry: Entry, view: Json) -> str:
    """HTML of the flow of the patches; of a router of whole photos, of its experts as boxes with example photos."""
    sorting = entry.card.sorting
    if sorting is None or view["settings"]["away"]:
        return flow_html(view)
    photos = []
    for photo in sorting["photos"]:
        picture = entry.examples.find(photo["id"])
        photos.append({**photo, "label": picture.label, "thumb": thumbnail_uri(picture.pixels)})
    return sorting_html(view, sorting, photos)


def experts(entry: Entry) -> dict[str, list[int]]:
    """All experts of a model, [layer, expert] by name, such as "L9·E3"."""
    return {
        f"{layer.name}·E{expert}": [layer.layer, expert]
        for layer in entry.facts.routers
        for expert in range(layer.num_experts)
    }


def examples(entries: dict[str, Entry]) -> list[Example]:
    """The first images of each model's data."""
    rows = []
    for title, entry in entries.items():
        for picture in entry.examples.usable(0, NUM_EXAMPLES):
            original = entry.examples.original(picture.id) or Image.fromarray(picture.pixels)
            rows.append(Example(original, title, picture.pixels))
    return rows
