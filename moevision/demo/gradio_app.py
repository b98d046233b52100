"""The explorer's opening as a Gradio app, to be launched or to be placed in somebody's Blocks.

    from moevision.demo import blocks

    blocks().launch()                       # the bundled models, as `python app.py` shows them
    with gr.Blocks() as mine:
        blocks("runs/pets").render()        # one's own, among other things

`moevision demo` serves the whole page. Here are an image, a model and experts to take away; the answer, and the flow of
the patches.

A visitor's image is opened by `safe_open` within the explorer's limits. Gradio would decode it before it calls us, and
open any file of the computer that a request names: so its preprocessing is off, and `uploaded_image` takes its place.
"""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from moevision.data.images import BadImageError, read_image
from moevision.demo import requests as read
from moevision.demo.examples import sharp_data_uri
from moevision.demo.facts import SHARP_PX
from moevision.demo.html import flow_html
from moevision.demo.models import Entry, open_entries
from moevision.demo.service import error_json
from moevision.demo.view import Settings, route_image
from moevision.demo.wire import MAX_BYTES, RequestError, open_data_uri, open_upload
from moevision.errors import UserError

if TYPE_CHECKING:
    import gradio as gr

NUM_EXAMPLES = 3  # of a model
DELETE_CACHE_S = (600, 3600)  # every ten minutes Gradio deletes uploads older than an hour
TITLE = "See inside a Mixture of Experts"
LEAD = (
    "Small networks share one photo. Which of them computes each patch, and what if some were away?"
)
# One image at a time: a request to /run doesn't wait in Gradio's queue.
_DECODING = threading.Lock()


def blocks(model: str | None = None, data: str | None = None) -> gr.Blocks:
    """A Gradio app: an image and a model in, the likeliest classes and the flow of the patches out.

    Its endpoint is `route(image, model, away) -> label, view`. A UserError if there is no such model, or no experts.

    In Blocks of your own, Gradio deletes uploads only if those have a `delete_cache`; `launch(max_file_size="8mb")`
    refuses larger files before they are stored.

    Args:
        model: a run folder, its model, or a timm address; the bundled models if None.
        data: images to choose from, as `moevision demo --data` takes them.
    """
    import gradio as gr

    entries = {entry.card.title: entry for entry in open_entries(model, data)}
    titles = list(entries)
    rows = examples(entries)
    app: gr.Blocks
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=DELETE_CACHE_S
    ) as app:
        gr.Markdown(f"# {TITLE}\n{LEAD}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(type="filepath", image_mode=None, label="Your photo", height=240)
                label = gr.Label(num_top_classes=5, label="The model says")
                choice = gr.Dropdown(
                    titles, value=titles[0], label="Model", visible=len(titles) > 1
                )
                names = list(experts(entries[titles[0]]))
                ablated = gr.Dropdown(names, value=[], multiselect=True, label="Take away")
            with gr.Column(scale=3, min_width=320):
                view = gr.HTML(label="The flow of the patches")
                gr.Examples([list(row) for row in rows], [image, choice], label="Examples")

        choice.change(
            lambda title: gr.Dropdown(list(experts(entries[title])), value=[]),
            choice,
            ablated,
            api_visibility="private",
        )
        listen = partial(
            gr.on,
            inputs=[image, choice, ablated],
            outputs=[label, view],
            preprocess=False,
            concurrency_id="route",
        )
        listen(
            [image.change, ablated.change],
            partial(answer_page, entries),
            api_visibility="private",
        )
        listen([], partial(answer, entries), api_name="route")  # of programs
        if rows:
            app.load(lambda: rows[0], None, [image, choice], api_visibility="private")
    return app


def answer_page(entries: dict[str, Entry], image: Any, model: Any, ablated: Any) -> tuple[Any, str]:
    """`answer` to the page, where experts of the model before stay chosen until their list has changed."""
    if isinstance(model, str) and model in entries and isinstance(ablated, list):
        names = list(experts(entries[model]))
        ablated = [name for name in ablated if name in names]
    return answer(entries, image, model, ablated)


def answer(entries: dict[str, Entry], image: Any, model: Any, away: Any) -> tuple[Any, str]:
    """`route` of what a request says, which nobody has looked at yet; a `gradio.Error` says what is wrong with it."""
    import gradio as gr

    try:
        title = read.choice({"model": model}, "model", tuple(entries))
        photo = uploaded_image(image, entries[title].facts.image_size)
        return route(entries, photo, title, away or [])
    except UserError as error:
        message = error_json(error, "route")["error"]
        raise gr.Error(message, print_exception=False) from error


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
        with _DECODING:
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
    with _DECODING:
        return open_upload(read_image(file, max_bytes=MAX_BYTES), side)


def route(
    entries: dict[str, Entry], image: Image.Image | None, model: str, away: list[str]
) -> tuple[Any, str]:
    """Classes with their probabilities, and the view as HTML; nothing without an image.

    `away` names experts as `experts` does; a RequestError names one that the model doesn't have.
    """
    trained = entries[model].variants["trained"]
    pairs = experts(entries[model])
    if not isinstance(away, list):
        raise RequestError(
            f"Experts to take away are a list of names such as {next(iter(pairs))!r}."
        )
    for name in away:
        if not isinstance(name, str) or name not in pairs:
            ranges = [
                f"{layer.name}·E0 to {layer.name}·E{layer.num_experts - 1}"
                for layer in trained.facts.routers
            ]
            raise RequestError(
                f"There is no expert {str(name)[:40]!r} in {model}: its experts are {', '.join(ranges)}."
            )
    ablated = read.ablated_experts([pairs[name] for name in away], trained.facts)
    if image is None:
        return None, ""

    settings = Settings(ablated_experts=ablated)
    view = route_image(trained.saved, image, settings=settings, facts=trained.facts).to_json()
    view["picture"]["name"] = "your photo"
    view["picture"]["sharp"] = sharp_data_uri(
        image, trained.saved.image_size, trained.saved.framing
    )
    probabilities = {row["class"]: row["p"] for row in view["prediction"]["moe"]}
    return probabilities, flow_html(view)


def experts(entry: Entry) -> dict[str, list[int]]:
    """All experts of a model, [layer, expert] by name, such as "L9·E3"."""
    return {
        f"{layer.name}·E{expert}": [layer.layer, expert]
        for layer in entry.facts.routers
        for expert in range(layer.num_experts)
    }


def examples(entries: dict[str, Entry]) -> list[tuple[Image.Image, str]]:
    """The first images of each model's data, in as many pixels as there are, with the model's title."""
    rows = []
    for title, entry in entries.items():
        for picture in entry.examples.usable(0, NUM_EXAMPLES):
            original = entry.examples.original(picture.id)
            rows.append((original or Image.fromarray(picture.pixels), title))
    return rows
