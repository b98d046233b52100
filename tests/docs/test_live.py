"""The explorer without a server (docs/live): its arithmetic is Pillow's, its models are the package's to the bit."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moevision.data.transforms import normalize, square_pixels
from moevision.demo.html import DOCS, app_page, modules
from moevision.demo.models import open_entries
from moevision.models.io import unpack
from tests.shared import load_script

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "docs" / "live"
live = load_script(SOURCES / "build.py")

PREPARE = f"""
import {{ normalized, squarePixels }} from "{(SOURCES / "pixels.js").as_posix()}";
let text = "";
for await (const piece of process.stdin) text += piece;
const {{ images, mean, std }} = JSON.parse(text);
console.log(JSON.stringify(images.map(({{ data, width, height, side }}) => {{
  const pixels = squarePixels({{ data, width, height }}, side);
  return [Array.from(pixels), Array.from(normalized(pixels, mean, std))];
}})));
"""


@pytest.mark.needs("node")
def test_an_image_is_prepared_as_python_does(tmp_path: Path) -> None:
    """Shrunk, enlarged, and left as it is: the same bytes. Noise and hard edges reach beyond 0 and 255 on the way."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    sizes = [
        (300, 200, 64),
        (201, 333, 168),
        (17, 23, 32),
        (64, 64, 64),
        (32, 32, 64),
        (512, 512, 168),
        (500, 40, 32),
    ]
    random = np.random.default_rng(0)
    photos = [
        random.integers(0, 256, (height, width, 3)).astype(np.uint8) for width, height, _ in sizes
    ]
    for photo in photos[::2]:
        photo[: len(photo) // 2] = 255 * (photo[: len(photo) // 2] > 127)
    opaque = [np.dstack([photo, np.full(photo.shape[:2], 255, np.uint8)]) for photo in photos]
    images = [
        {"data": rgba.ravel().tolist(), "width": width, "height": height, "side": side}
        for rgba, (width, height, side) in zip(opaque, sizes, strict=True)
    ]
    (tmp_path / "prepare.mjs").write_text(PREPARE)
    asked = json.dumps({"images": images, "mean": mean, "std": std})
    command = ["node", "--disable-warning=MODULE_TYPELESS_PACKAGE_JSON", tmp_path / "prepare.mjs"]
    done = subprocess.run(
        command, input=asked, capture_output=True, text=True, timeout=600, check=True
    )
    for photo, (_, _, side), (pixels, values) in zip(
        photos, sizes, json.loads(done.stdout), strict=True
    ):
        expected = square_pixels(Image.fromarray(photo), side)
        assert np.array_equal(np.array(pixels).reshape(side, side, 3), expected)
        own = normalize(torch.from_numpy(expected).permute(2, 0, 1)[None], mean, std)
        torch.testing.assert_close(
            torch.tensor(values).view(1, 3, side, side), own, rtol=0, atol=1e-6
        )


@pytest.mark.needs("onnx")
def test_weights_are_stored_smaller_where_nothing_is_lost() -> None:
    """3 / 8 has three significant bits, 1 / 3 more than bfloat16's eight."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    exact, rounded = np.full((16, 16), 3 / 8, np.float32), np.full((16, 16), 1 / 3, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "exact"], ["y"]),
            helper.make_node("MatMul", ["y", "rounded"], ["z"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 16])],
        [numpy_helper.from_array(exact, "exact"), numpy_helper.from_array(rounded, "rounded")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    smaller = live.in_bfloat16(model)
    kept = {
        weight.name: weight.data_type for weight in onnx.load_from_string(smaller).graph.initializer
    }
    assert kept == {"exact.bf16": TensorProto.BFLOAT16, "rounded": TensorProto.FLOAT}
    x = np.arange(16, dtype=np.float32)[None]
    before, after = (
        onnxruntime.InferenceSession(each).run(None, {"x": x})[0] for each in (model, smaller)
    )
    assert np.array_equal(before, after)


@pytest.mark.needs("photos")
def test_eight_bits_are_multiplied_out_as_the_package_does() -> None:
    entry = next(one for one in open_entries(None) if one.card.id == "photos")
    saved = live.stored(entry)
    weights = unpack(live.bundled_folder("photos") / "trained" / live.PACKED)
    packed = [name for name, _ in saved.net.named_parameters() if name.endswith(".original")]
    assert len(packed) == 40
    for name in packed:
        own = name.replace("parametrizations.", "").removesuffix(".original")
        assert saved.net.get_parameter(name).dtype == torch.int8
        owner, _, last = own.rpartition(".")
        assert torch.equal(getattr(saved.net.get_submodule(owner), last), weights[own])


def test_the_page_is_the_explorers_with_another_who_answers() -> None:
    """Its own file stands in the place of the explorer's, and no two modules declare one name."""
    names = modules("app.js", live.read_module)
    own = {name for name in names if (SOURCES / name).exists()}
    assert own == {"app_fetch.js", "pages.js", "pixels.js"}
    others = {"worker.js", "types.d.ts", "ort.wasm.bundle.min.d.mts", "live.css", "build.py"}
    assert own | others == {file.name for file in SOURCES.iterdir() if file.is_file()}
    text = "\n".join(DOCS.sub("", live.read_module(name)) for name in names)
    declared = re.findall(
        r"^(?:export )?(?:async )?(?:function|class|const|let|var) (\w+)", text, re.M
    )
    assert len(set(declared)) == len(declared)
    page = app_page({"models": []}, [], read=live.read_module, style="nothing{}").text
    assert "new Worker(" in page
    assert "api/${" not in page  # where the explorer's asks its server
    assert "nothing{}" in page


def test_names_of_recorded_answers_are_files_of_the_folder() -> None:
    assert live.key("route", "pets", "pets/test/4") == "route-pets-pets_test_4"
    assert live.key("sharp", "cats", "data/a b.jpg") == "sharp-cats-data_a_b.jpg"


def test_a_shared_link_shows_a_case_of_the_cards(tmp_path):
    """The photo stands at the left; the page names the picture by its address where there is one."""
    entries = [entry for entry in open_entries(None) if entry.card.id == "cifar10"]
    head = live.shared(entries, tmp_path, "https://example.org/moevision/")
    assert 'og:image" content="https://example.org/moevision/live/card.jpg"' in head
    assert 'og:url" content="https://example.org/moevision/live/"' in head
    with Image.open(tmp_path / "card.jpg") as card:
        assert card.size == (1200, 630)
        assert card.getpixel((1190, 10)) == (251, 251, 249)  # paper, beside the photo
        assert np.asarray(card.crop((0, 0, 630, 630))).std() > 30
    assert (tmp_path / "card.jpg").stat().st_size < 300_000
    assert "og:url" not in live.shared(entries, tmp_path, "")
    page = app_page({"models": []}, [], read=live.read_module).text
    assert live.LARGE_CARD in page.replace('name="twitter:card" content="summary"', live.LARGE_CARD)
