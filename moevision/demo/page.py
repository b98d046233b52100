"""What gradio serves: the explorer's document with the functions that it calls, and one documented API endpoint.

The document is ours, not gradio's frontend, whose scripts and fonts (330 KB compressed) would come before the stage; it
calls the `server_functions` of a `gr.HTML` as gradio's client does. gradio has queue, login, tunnel and the API.

gradio is imported inside functions: it takes seconds, and `import moevision` must not.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from moevision.demo.gate import WAITING, Gate
from moevision.demo.html import Document, app_page
from moevision.demo.service import Explorer, Json, brings_image, told

if TYPE_CHECKING:
    import gradio as gr

QUEUE = 32
IDLE_S = 0.05
# Calls that gradio starts at once: more than the doors take, so that none waits in its queue.
MAX_THREADS: Final = 2 * WAITING + 32


class Doors(NamedTuple):
    """Where visitors' images are decoded, and where requests are answered: with images in the size of the model."""

    decoding: Gate
    answering: Gate

    async def ask(self, explorer: Explorer, address: str, name: str, request: Any) -> Json:
        """The answer to a request that comes from this address."""
        try:
            if brings_image(request):
                request = await self.decoding.run(address, explorer.opened, name, request)
            return await self.answering.run(address, explorer.answer, name, request)
        except Exception as error:  # the image is none, or a gate is full
            return told(error, name)

    def close(self) -> None:
        """Let nobody in any more and wait for those inside."""
        for gate in self:
            gate.close()


def build_page(explorer: Explorer, doors: Doors) -> tuple[gr.Blocks, Document]:
    """The document that shows `explorer`, and what answers it, behind `doors`."""
    # Read by gradio when Blocks are built; anything but "True" means: no telemetry and no look-up of a newer version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    page: gr.Blocks
    with gr.Blocks(title="moevision explorer", analytics_enabled=False, fill_width=True) as page:
        functions = gr.HTML(
            server_functions=[_server_function(explorer, doors, name) for name in explorer.handlers],
        )
        route = _route_endpoint(explorer, doors)
        # gradio's queue knows no addresses: it hands every call on at once, and the doors say whose turn it is.
        gr.api(route, api_name="route", api_description=inspect.getdoc(route), concurrency_limit=None)
    # At "auto" the loop that starts the calls also tells who waits how long they will, and ends for good if it can't.
    page.queue(max_size=QUEUE, status_update_rate=2.0)
    # gradio's queue looks for calls a thousand times a second, so that an idle page keeps 4 % of a core busy.
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = IDLE_S
    return page, app_page(explorer.start_boot(), explorer.start_views(), functions._id)


def _server_function(explorer: Explorer, doors: Doors, name: str) -> Callable[..., Awaitable[Json]]:
    import gradio as gr

    async def ask(request: Any, visitor: Any) -> Json:
        # JavaScript's JSON drops an argument that isn't there.
        return await doors.ask(explorer, visitor.client.host, name, {} if request is None else request)

    ask.__name__ = name
    ask.__annotations__["visitor"] = gr.Request  # by which gradio knows what to give
    return ask


def _route_endpoint(explorer: Explorer, doors: Doors) -> Callable[..., Awaitable[dict[str, Any]]]:
    import gradio as gr

    default = next(iter(explorer.entries))

    async def route(
        picture: str = "",
        example: str = "",
        model: str = default,
        variant: str = "trained",
        top_k: int | None = None,
        capacity: float | None = None,
        intervention: dict[str, Any] | None = None,
        _visitor: Any = None,
    ) -> dict[str, Any]:
        """Send an image through a model and get the route of every patch.

        Args:
            picture: gradio_client.handle_file("cat.jpg"), or the image itself as base64 text, with or without
                "data:image/...;base64," in front. Paths and addresses are never opened.
            example: instead of an image, the id of an example such as "pets/test/0".
            model: id of a model.
            variant: trained, unbalanced or untrained.
            top_k: experts per patch (on average, where experts choose patches); null as trained.
            capacity: capacity factor; null for the model's own limit, if it has one.
            intervention: {"kind": "ablate" | "force" | "random", "layer": int, "expert": int,
                "fill": "next_best" | "zero", "seed": int}, or null.

        Returns:
            A moevision.view/2 object: "prediction" (moe and dense, each [{"class", "p"}]) and "layers" (per MoE layer
            "router", "kind" ("token_choice", "expert_choice" or "soft"), "route_by" ("token", or "image" where all
            patches share one choice), "num_experts", "top_k", "experts", "weights", "kept" [patches][experts of the
            patch, best first], "probs" [patches][experts], "margin", "entropy", "counts", "requested", "slowest",
            "computation" (scores, lengths of the experts' outputs, of their sum and of the residual stream; each
            {"unit", "shape", "data"}, base64 of little-endian int16 times the unit), and
            for Soft MoE "slots" and "reads" [experts][patches], the mean over an expert's slots of what they read),
            beside "model", "picture" and "settings"; or {"error": a sentence,
            "code": "bad_request" | "busy" | "bad_image" | "too_large"}.
        """
        given = {"kind": "example", "id": example} if example else {"kind": "upload", "data": picture}
        request = {
            "model": model,
            "variant": variant,
            "picture": given,
            "top_k": top_k,
            "capacity": capacity,
            "intervention": intervention,
        }
        return await doors.ask(explorer, _visitor.client.host, "route", request)

    route.__annotations__["_visitor"] = gr.Request
    return route
