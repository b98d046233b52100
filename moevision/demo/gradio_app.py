"""The explorer's opening as a Gradio app, to be launched or to be placed in somebody's Blocks.

    from moevision.demo import blocks

    blocks().launch()                       # the bundled models, as `python app.py` shows them
    with gr.Blocks() as mine:
        blocks("runs/pets").render()        # one's own, among other things

`moevision demo` serves the whole page. Here are an image, a model and experts to take away; the answer, and the flow of
the patches.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from moevision.analysis.intervention import Intervention
from moevision.data.images import upright_rgb
from moevision.demo.examples import sharp
from moevision.demo.html import flow_html
from moevision.demo.models import Entry, open_entries
from moevision.demo.view import Settings, route_image

if TYPE_CHECKING:
    import gradio as gr

SHOWN = 3  # examples of a model
LEAD = "Small networks share one photo. Which of them computes each patch, and what if some were away?"


def blocks(model: str | None = None, data: str | None = None) -> gr.Blocks:
    """A Gradio app: an image and a model in, the likeliest classes and the flow of the patches out.

    Its endpoint is `route(image, model, away) -> label, view`. A UserError if there is no such model, or no experts.

    Args:
        model: a run folder, its model, or a timm address; the bundled models if None.
        data: images to choose from, as `moevision demo --data` takes them.
    """
    import gradio as gr

    entries = {entry.card.title: entry for entry in open_entries(model, data)}
    first = next(iter(entries))
    shown = examples(entries)
    app: gr.Blocks
    with gr.Blocks(title="See inside a Mixture of Experts", analytics_enabled=False, fill_width=True) as app:
        gr.Markdown(f"# See inside a Mixture of Experts\n{LEAD}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(type="pil", image_mode=None, label="Your photo", height=240)
                label = gr.Label(num_top_classes=5, label="The model says")
                choice = gr.Dropdown(list(entries), value=first, label="Model", visible=len(entries) > 1)
                # programs may name those of any model: what a page's list holds at its start isn't all that is right
                away = gr.Dropdown(
                    experts(entries[first]), value=[], multiselect=True, allow_custom_value=True, label="Take away"
                )
            with gr.Column(scale=3, min_width=320):
                view = gr.HTML(label="The flow of the patches")
                gr.Examples([list(one) for one in shown], [image, choice], label="Examples")
        choice.change(
            lambda title: gr.Dropdown(experts(entries[title]), value=[]), choice, away, api_visibility="private"
        )
        gr.on([image.change, away.change], partial(route, entries), [image, choice, away], [label, view],
              api_name="route")  # fmt: skip
        if shown:
            app.load(lambda: shown[0], None, [image, choice], api_visibility="private")
    return app


def route(entries: dict[str, Entry], image: Image.Image | None, model: str, away: list[str]) -> tuple[Any, str]:
    """Classes with their probabilities, and the view as HTML; nothing without an image.

    `away` names experts as `experts` does; after a change of the model those of another one may still be chosen.
    """
    if image is None:
        return None, ""
    trained = entries[model].variants["trained"]
    photo = upright_rgb(image)
    gone = [one.removeprefix("L").partition("·E") for one in away if one in experts(entries[model])]
    settings = Settings(away=tuple(Intervention("ablate", int(layer), int(expert)) for layer, _, expert in gone))
    view = route_image(trained.saved, photo, settings=settings, facts=trained.facts).to_json()
    view["picture"] |= {"name": "your photo", "sharp": sharp(photo, trained.saved.image_size, trained.saved.framing)}
    return {one["class"]: one["p"] for one in view["prediction"]["moe"]}, flow_html(view)


def experts(entry: Entry) -> list[str]:
    """All experts of a model by name, "L9·E3"."""
    return [f"{router.name}·E{expert}" for router in entry.facts.routers for expert in range(router.num_experts)]


def examples(entries: dict[str, Entry]) -> list[tuple[Image.Image, str]]:
    """The first images of each model's data, in as many pixels as there are, with the model's title."""
    return [
        (entry.examples.original(one.id) or Image.fromarray(one.pixels), title)
        for title, entry in entries.items()
        for one in entry.examples.usable(0, SHOWN)
    ]
