"""The explorer without a server: a folder of files in which the bundled models run in the visitor's browser.

    python docs/live/build.py site/live
    python -m http.server --directory site/live

The page is `moevision demo`'s own; only who answers it is another (`app_fetch.js` beside this file): what was recorded
here of the examples, and for own images and experts that are taken away the exported model, run by onnxruntime-web in a
worker (`worker.js`). What neither can answer is left out of the page. onnxruntime-web comes from npm, in the version
below; everything is asked of the folder itself, and nothing is sent anywhere.

Files that end in .bin are gzip, under a name that no web server unpacks by itself. A model is stored as the package
stores it, in bfloat16 or in eight bits, and multiplied out when it is opened: its numbers are the package's to the bit.
"""

from __future__ import annotations

import argparse
import base64
import copy
import gzip
import html
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, cast

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moevision.data.emoji import CELL, EmojiPages, read_sheet
from moevision.demo.facts import LayerFacts
from moevision.demo.html import app_page, read_asset, without_comments
from moevision.demo.models import Entry, bundled_folder, open_entries
from moevision.demo.service import Explorer, ood_sentence
from moevision.errors import UserError, json_text
from moevision.models.export import export_onnx
from moevision.models.io import SavedModel
from moevision.models.safe_files import PACKED, SCALE, parts_of

HERE: Final = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the one place that holds the site's address
from address import address  # noqa: E402

ORT: Final = "onnxruntime-web@1.30.0"
ORT_SCRIPT: Final = "ort.wasm.bundle.min.mjs"
ORT_FILES: Final = (ORT_SCRIPT, "ort-wasm-simd-threaded.wasm")
NOTICE: Final = f"""\
{ORT_SCRIPT} and ort.bin are of {ORT} (ONNX Runtime, Copyright (c) Microsoft Corporation, MIT licence:
https://github.com/microsoft/onnxruntime/blob/main/LICENSE, with ThirdPartyNotices.txt beside it). All else is of
moevision, Apache-2.0; the models and their photos under the terms below.
"""
POLICY: Final = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; connect-src 'self'; worker-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
CARD: Final = "card.jpg"  # what a shared link shows
CARD_SIZE: Final = (1200, 630)
LARGE_CARD: Final = 'name="twitter:card" content="summary_large_image"'
PAPER, INK, GREY = "#fbfbf9", "#1b1c1e", "#6b6d70"
NO_SERVER: Final = "changing k or capacity takes the server that moevision demo starts"
_LARGE: Final = 8_000_000  # bytes of a model that takes its time
_SMALLEST: Final = 256  # elements of a weight that is worth another type
Json = dict[str, Any]


def build(out: Path, ort: Path | None = None) -> None:
    """Write the folder; `ort` has onnxruntime-web's two files, which are fetched from npm where it is None."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        folder = _fetch(Path(work)) if ort is None else ort
        shutil.copy(folder / ORT_FILES[0], out)
        _pack(out / "ort.bin", (folder / ORT_FILES[1]).read_bytes())
    shutil.copy(HERE / "worker.js", out)
    entries = open_entries(None)
    explorer = Explorer(entries)
    notices = [bundled_folder(entry.card.id) / "NOTICE" for entry in entries]
    texts = [
        f"{file.parent.name}\n\n{file.read_text('utf-8')}" for file in notices if file.is_file()
    ]
    (out / "NOTICE.txt").write_text("\n\n".join([NOTICE, *texts]), "utf-8")
    recorded: dict[str, Json] = {}
    for entry in entries:
        recorded |= _record(explorer, entry)
        with tempfile.TemporaryDirectory() as work:
            file = Path(work) / "model.onnx"
            export_onnx(stored(entry), file, routes=True)
            _pack(out / f"{entry.card.id}.onnx.bin", in_bfloat16(file.read_bytes()))
    for name, answer in recorded.items():
        _pack(out / f"{name}.bin", json_text(answer).encode())
    sizes = {entry.card.id: (out / f"{entry.card.id}.onnx.bin").stat().st_size for entry in entries}
    boot = _boot(explorer, entries, sizes) | {"recorded": sorted(recorded)}
    explorer.close()
    first = recorded[key("route", entries[0].card.id, boot["default"]["picture"])]
    page = app_page(
        boot, [first], read=read_module, style=without_comments(read_module("live.css"))
    )
    policy = f"{POLICY}; {page.policy} 'self' 'wasm-unsafe-eval'"
    head = f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += shared(entries, out, address().site)
    text = page.text.replace('name="twitter:card" content="summary"', LARGE_CARD, 1)
    (out / "index.html").write_text(text.replace('<meta charset="utf-8">', head, 1), "utf-8")


# ---- what a link to the page shows where it is shared ---------------------------------------------------------------


def shared(entries: Sequence[Entry], out: Path, site: str) -> str:
    """Write the picture of the first case that the cards tell, and return what the page's head says of it."""
    told = next((entry for entry in entries if entry.card.matters), None)
    if told is None:
        return ""
    share_card(told).save(out / CARD, quality=88)
    live = f"{site.rstrip('/')}/live/" if site else ""
    width, height = CARD_SIZE
    properties = {"image": live + CARD, "image:width": width, "image:height": height}
    if live:
        properties["url"] = live
    return "".join(
        f'\n<meta property="og:{name}" content="{html.escape(str(value))}">'
        for name, value in properties.items()
    )


def share_card(entry: Entry) -> Image.Image:
    """A case of a card as a picture of 1200 x 630: the image, the expert that goes, the answer before and after."""
    case = cast(Json, entry.card.matters)
    picture = entry.examples.find(case["picture"])
    original = entry.examples.original(picture.id) or Image.fromarray(picture.pixels)
    _, height = CARD_SIZE
    ((_, expert),) = case["away"]
    before, after = case["before"], case["after"]

    card = Image.new("RGB", CARD_SIZE, PAPER)
    card.paste(ImageOps.fit(original.convert("RGB"), (height, height)), (0, 0))
    draw = ImageDraw.Draw(card)
    left = height + 48
    headline = f"Without expert {expert}:\nnot {before['class']},\nbut {after['class']}."
    draw.multiline_text((left, 70), headline, INK, ImageFont.load_default(56), spacing=14)
    answers = f"{before['class']} {before['p']:.0%}, then {after['class']} {after['p']:.0%}"
    draw.text((left, 420), answers, INK, ImageFont.load_default(32))
    draw.text(
        (left, 530), "moevision: see inside\na Mixture of Experts", GREY, ImageFont.load_default(28)
    )
    return card


def read_module(name: str) -> str:
    """The text of a file of the page: the one beside this file, where there is one, else the explorer's."""
    own = HERE / name
    return own.read_text(encoding="utf-8") if own.exists() else read_asset(name)


def key(*words: object) -> str:
    """The name of a recorded answer: what was asked, of which model, about what (`keyOf` in app_fetch.js)."""
    return re.sub(r"[^\w.-]", "_", "-".join(map(str, words)), flags=re.ASCII)


# ---- what the page knows and what is recorded -----------------------------------------------------------------------


def _boot(explorer: Explorer, entries: Sequence[Entry], sizes: Mapping[str, int]) -> Json:
    """What the explorer tells a page at its start, without what takes a server; `sizes` are those of the files."""
    boot: Json = copy.deepcopy(explorer.boot({}))
    for model, entry in zip(boot["models"], entries, strict=True):
        kinds = ("top_k", "capacity", "force")
        model["routers"] = [
            {**router, "noise": "none", "refused": dict.fromkeys(kinds, NO_SERVER)}
            for router in model["routers"]
        ]
        first = _views(explorer, entry, model["examples"][:1])[0]
        model |= {
            "variants": ["trained"],
            "num_examples": len(model["examples"]),
            "max_top_k": 0,
            # Of one layer, the browser tries all sets in less than a second.
            "can_search": model["can_search"] and len(model["layers"]) == 1,
            "device": {
                "mean": entry.variants["trained"].saved.mean,
                "std": entry.variants["trained"].saved.std,
                "unlike": ood_sentence(entry.card.recognized),
                "bytes": sizes[entry.card.id],
                "view": {
                    **first,
                    "picture": None,
                    "layers": [_facts(layer) for layer in first["layers"]],
                },
            },
        }
    return {**boot, "whole": True, "device": True}


def _facts(layer: Mapping[str, Any]) -> Json:
    """What a view says about a layer whatever the image."""
    names = set(LayerFacts.__dataclass_fields__) | {"name", "words"}
    facts = {name: value for name, value in layer.items() if name in names}
    return {**facts, "computation": None, "reads": None}


def _views(explorer: Explorer, entry: Entry, examples: Sequence[Mapping[str, Any]]) -> list[Json]:
    views = []
    for example in examples:
        request = {"model": entry.card.id, "picture": {"kind": "example", "id": example["id"]}}
        view = _answer(explorer, "route", request)
        views.append({**view, "layers": [{**layer, "noise": "none"} for layer in view["layers"]]})
    return views


def _record(explorer: Explorer, entry: Entry) -> dict[str, Json]:
    """Answers by `key`: the examples' views, sharper images and moments of training, and what experts take."""
    model = entry.card.id
    about = next(about for about in explorer.boot({})["models"] if about["id"] == model)
    examples = list(about["examples"])
    telling = (entry.card.matters or {}).get("picture")
    if telling is not None and telling not in [example["id"] for example in examples]:
        examples.append({"id": telling})
    recorded = about["history"] or {"images": []}
    # The first expert that a visitor takes away shouldn't wait for a large model.
    is_large = is_packed(entry) and packed_file(entry).stat().st_size > _LARGE

    answers = {
        key("route", model, view["picture"]["id"]): view
        for view in _views(explorer, entry, examples)
    }
    for example in examples:
        id = example["id"]
        request = {"model": model, "picture": id}
        answers[key("sharp", model, id)] = _answer(explorer, "sharp", request)
        if id in recorded["images"]:
            answers[key("history", model, id)] = _answer(explorer, "history", request)
        if is_large:
            answers[key("without", model, id)] = _without(explorer, entry, id)
    for id, fall in falls_of(entry).items():
        request = {
            "model": model,
            "picture": {"kind": "example", "id": id},
            "away": fall["away"],
        }
        flat = [number for pair in fall["away"] for number in pair]
        answers[key("effect", model, id, *flat)] = _answer(explorer, "what_if", request)
    if entry.card.data_kind == EmojiPages.name:
        answers |= _typing(explorer, model)
    for layer in about["layers"]:
        request = {"model": model, "variant": "trained", "layer": layer}
        answers[key("experts", model, layer)] = _answer(explorer, "experts", request)

    cards = [card for answer in answers.values() for card in answer.get("experts", ())]
    patches = [patch for card in cards for kind in ("top", "random") for patch in card[kind]]
    others = {patch["picture"] for patch in patches} - {example["id"] for example in examples}
    if others:
        pictures = [entry.examples.find(id) for id in sorted(others)]
        answers[key("pictures", model)] = {picture.id: picture.to_json() for picture in pictures}
    return {name: answer for name, answer in answers.items() if answer != {"src": None}}


def falls_of(entry: Entry) -> dict[str, Any]:
    """By id the examples whose answer few experts change, with those that are `away`."""
    matters = entry.card.matters
    falls = dict(entry.card.falls)
    if matters is not None:
        falls[matters["picture"]] = matters
    return {id: fall for id, fall in falls.items() if fall["away"]}


def _typing(explorer: Explorer, model: str) -> dict[str, Json]:
    """What a page needs to draw emoji that a visitor types: which to offer, and the sheet with all of them."""
    offered = _answer(explorer, "emoji", {"model": model})
    file = files("moevision") / "data" / "assets" / "emoji.png"
    data = file.read_bytes()
    picture = base64.b64encode(data).decode()
    with Image.open(io.BytesIO(data)) as sheet:
        columns = sheet.width // CELL
    return {
        key("emoji", model): offered,
        key("sheet", model): {
            "src": f"data:image/png;base64,{picture}",
            "cell": CELL,
            "columns": columns,
            "emoji": [(one.character, one.group) for one in read_sheet().emoji],
            "fewest": offered["fewest"],
            "most": offered["most"],
        },
    }


def _without(explorer: Explorer, entry: Entry, id: str) -> Json:
    """What a view of an example says without each one expert, by layer and expert as in "9.3"."""
    answers = {}
    for router in entry.facts.routers:
        for expert in range(router.num_experts):
            picture = {"kind": "example", "id": id}
            away = [[router.layer, expert]]
            request = {"model": entry.card.id, "picture": picture, "away": away}
            view = _answer(explorer, "route", request)
            facts = {name for layer in view["layers"] for name in _facts(layer)}
            layers = [
                {name: layer[name] for name in layer if name not in facts}
                for layer in view["layers"]
            ]
            answers[f"{router.layer}.{expert}"] = {
                "layers": layers,
                "moe": view["prediction"]["moe"],
                "shares": view["shares"],
            }
    return answers


def _answer(explorer: Explorer, name: str, request: Json) -> Json:
    answer = explorer.answer(name, request)
    if "error" in answer:
        raise UserError(f"The explorer can't answer {name} about {request}: {answer['error']}")
    return answer


# ---- models ---------------------------------------------------------------------------------------------------------


class _Unpacked(nn.Module):
    """A weight from its eight bits, q [..., out, in] times s [..., out, G] for G parts of a row, as `io.unpack`."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.float()[..., None])

    def forward(self, whole: Tensor) -> Tensor:
        scale = cast(Tensor, self.scale)
        return (whole.float().unflatten(-1, (scale.shape[-2], -1)) * scale).flatten(-2)


def packed_file(entry: Entry) -> Path:
    """Where the model's weights are, if the package carries it in eight bits."""
    return bundled_folder(entry.card.id) / "trained" / PACKED


def is_packed(entry: Entry) -> bool:
    """Whether the package carries the model in eight bits."""
    return packed_file(entry).is_file()


def stored(entry: Entry) -> SavedModel:
    """The trained model of an entry; one that is packed in eight bits keeps them, and multiplies out as it runs."""
    saved = entry.variants["trained"].saved
    if not is_packed(entry):
        return saved
    net, weights = copy.deepcopy(saved.net), packed_weights(packed_file(entry))
    scaled = [name.removesuffix(SCALE) for name in weights if name.endswith(SCALE)]
    for name in sorted(set(scaled) & net.state_dict().keys()):
        owner, _, last = name.rpartition(".")
        module = net.get_submodule(owner)
        setattr(module, last, nn.Parameter(weights[name], requires_grad=False))
        parametrize.register_parametrization(
            module, last, _Unpacked(weights[name + SCALE]), unsafe=True
        )
    return replace(saved, net=net)


def packed_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a packed file and, before them, of the bundled model whose rest it is."""
    weights: dict[str, Tensor] = {}
    for part in parts_of(file):
        own = load_file(part)
        for name in own:  # stored anew, perhaps without a scale
            weights.pop(name + SCALE, None)
        weights |= own
    return weights


def in_bfloat16(model: bytes) -> bytes:
    """An ONNX model with float32 weights as bfloat16 where they lose nothing by it; they are cast when it is opened."""
    import numpy as np
    import onnx

    proto = onnx.load_from_string(model)
    casts = []
    for weight in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if weight.data_type != onnx.TensorProto.FLOAT or values.size < _SMALLEST:
            continue
        bits = np.ascontiguousarray(values).view(np.uint32)
        if np.any(bits & 0xFFFF):
            continue
        name = weight.name
        weight.name, weight.data_type = f"{name}.bf16", onnx.TensorProto.BFLOAT16
        weight.ClearField("float_data")
        weight.raw_data = (bits >> 16).astype("<u2").tobytes()
        casts.append(
            onnx.helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT)
        )
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return cast(bytes, proto.SerializeToString())


# ---- files ----------------------------------------------------------------------------------------------------------


def _pack(file: Path, data: bytes) -> None:
    file.write_bytes(gzip.compress(data, 9, mtime=0))


def _fetch(work: Path) -> Path:
    """onnxruntime-web's files, from the registry that npm is set to."""
    if shutil.which("npm") is None:
        raise UserError(
            f"{ORT} comes from npm, which is not installed: install node, or give --ort FOLDER."
        )
    done = subprocess.run(
        ["npm", "pack", ORT, "--silent"], cwd=work, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(
            f"npm could not fetch {ORT} ({done.stderr.strip()[-200:]}): give --ort FOLDER."
        )
    with tarfile.open(work / done.stdout.strip().splitlines()[-1]) as archive:
        for name in ORT_FILES:
            archive.extract(f"package/dist/{name}", work, filter="data")
    return work / "package" / "dist"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folder and say how large it is."""
    parser = argparse.ArgumentParser(
        prog="python docs/live/build.py", description="The explorer without a server."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--ort", type=Path, metavar="FOLDER", help=f"dist/ of {ORT}; by default npm fetches it"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    build(options.out, options.ort)
    sizes = {file.name: file.stat().st_size for file in options.out.iterdir()}
    for name, size in sorted(sizes.items(), key=lambda one: -one[1])[:8]:
        print(f"{size / 1e6:6.2f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:6.2f} MB  {len(sizes)} files in {options.out}")


if __name__ == "__main__":
    main()
