"""Exported files answer as the model does, carry what is needed to use them, and are refused where they can't."""

import copy
import json
import math
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import moevision
from moevision.analysis import Intervention
from moevision.analysis.intervention import intervene
from moevision.commands.predict import predict_batch
from moevision.errors import UserError
from moevision.layers import ROUTERS, ColourRouter, moe_layers
from moevision.models import export as export_module
from moevision.models.export import (
    ExportReport,
    export_onnx,
    export_program,
    exported_facts,
)
from moevision.models.io import SavedModel, load_model, save_model
from moevision.models.ood import answers, fit_ood, pooled
from moevision.models.shares import patch_shares
from moevision.train.report import template
from tests.shared import SMALL_VIT, noise_images

NAMES = ["cat", "dog", "Käuzchen"]
# A file takes seconds to write, whatever is in it: each router, and each option, is one layer of a model.
KINDS = ("vmoe_top_k", "expert_choice", "soft")  # one of each kind of routing
OTHERS = [name for name in ROUTERS if name not in KINDS]
OPTIONS = (
    {"router": "vmoe_top_k", "eval_capacity_factor": 0.75},
    {"router": "vmoe_top_k", "eval_capacity_factor": 0.75, "batch_priority": True},
    {"router": "switch", "normalize_gates": True, "num_shared_experts": 1},
    {"router": "expert_choice", "num_experts": 4, "top_k": 2},
    {"router": "sigmoid", "num_experts": 6, "top_k": 1},
    {"router": "sigmoid", "route_by": "image"},
    # A capacity of the batch in training only is no obstacle.
    {"router": "vmoe_top_k", "capacity_factor": 1.0, "capacity_group": "batch"},
)
# What is exported, and the opset: the smallest and the largest among them.
CASES = {
    "each kind": ({"router": list(KINDS)}, 20),
    "all other routers": ({"router": OTHERS}, 18),
    "every option": (OPTIONS, 23),
}
QUICK = ("each kind",)


def tiny(*layers: dict, **options) -> SavedModel:
    """MoE blocks of 32 px, with weights so large that one token at another expert changes logits by > 1e-3.

    One for each of `layers`; or, with the same `options`, as many as there are routers in a list, else two.
    """
    torch.manual_seed(0)
    routers = options.get("router")
    depth = 1 if layers else len(routers) if isinstance(routers, list) else 2
    nets = [
        timm.create_model("test_vit_moe", num_classes=3, depth=depth, moe_layers="all", **layer)
        for layer in layers or (options,)
    ]
    nets[0].blocks.extend(block for net in nets[1:] for block in net.blocks)
    return SavedModel(with_character(nets[0].eval()), NAMES, 32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def with_distances(model: SavedModel) -> SavedModel:
    with torch.no_grad():
        features = pooled(model.net, noise_images(100, seed=3)).double().numpy()
    return replace(model, strangers=fit_ood(features[:60], np.arange(60) % 3, features[60:]))


def with_character(net: nn.Module) -> nn.Module:
    for layer in moe_layers(net):
        for parameter in [*layer.router.parameters(), *layer.experts.parameters()]:
            nn.init.normal_(parameter, std=0.4)
        if isinstance(layer.router, ColourRouter):
            nn.init.normal_(layer.router.centroids)
    return net


def run_onnx(path: Path, images: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    return torch.from_numpy(
        onnxruntime.InferenceSession(str(path)).run(["logits"], {"image": images.numpy()})[0]
    )


@pytest.mark.needs("onnx")
@pytest.mark.parametrize(
    "case",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.deep) for name in CASES],
)
def test_the_file_answers_as_the_model(case, tmp_path):
    import onnx

    chosen, opset = CASES[case]
    model, path = tiny(**chosen) if isinstance(chosen, dict) else tiny(*chosen), tmp_path / "model"
    before = copy.deepcopy(model.net.state_dict())
    report = export_onnx(model, path, opset=opset)
    versions = {entry.domain: entry.version for entry in onnx.load(path).opset_import}
    assert versions[""] == opset
    size = path.stat().st_size
    assert report == ExportReport(path, size, 4, report.max_logit_delta, 1, report.run)
    assert report.max_logit_delta <= 1e-4

    with torch.no_grad():  # other images and batch sizes than those that the exporter looked at
        expected, routings = moevision.forward_routing(model.net, noise_images(5, seed=7))
    assert all(
        (routing.expert_weights().flatten(0, 1) > 0).any(0).sum() > 1 for routing in routings
    )
    for batch in (1, 3, 5):
        torch.testing.assert_close(
            run_onnx(path, noise_images(5, seed=7)[:batch]), expected[:batch], rtol=0, atol=1e-4
        )

    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    assert {layer.experts.backend for layer in moe_layers(model.net)} == {"auto"}
    with torch.no_grad():  # with gradients few rows go another way, and round otherwise
        assert torch.equal(model.net(noise_images(5, seed=7)), expected)


# One of each rule for gates; `switch` has that of `vmoe_top_k`, `hash` and `position` that of `random`.
ROUTED = ["sigmoid", "bias_balanced", "cosine", "random", "colour"]


@pytest.mark.deep
@pytest.mark.needs("onnx")
@pytest.mark.parametrize(
    ("layers", "known"),
    [
        pytest.param(
            [
                {"router": "vmoe_top_k"},
                {"router": "noisy_top_k", "num_experts": 3},
                {"router": "vmoe_top_k", "eval_capacity_factor": 0.75},
                {"router": "sigmoid", "route_by": "image"},
            ],
            True,
            id="distance, capacity, and by image",
        ),
        pytest.param({"router": ROUTED}, False, id="other gates"),
    ],
)
def test_routes_and_experts_that_are_away_are_those_of_torch(layers, known, tmp_path):
    """Choices, gates, affinities and logits: as trained, without one expert, without several, and with one left."""
    model, path = (
        tiny(**layers) if isinstance(layers, dict) else tiny(*layers),
        tmp_path / "model.onnx",
    )
    model = with_distances(model) if known else model
    for number, layer in enumerate(moe_layers(model.net)):
        layer.layer_index = number
    assert export_onnx(model, path, routes=True).max_logit_delta <= 1e-4
    run = export_module.load_exported(path)
    sizes = [layer.router.num_experts for layer in moe_layers(model.net)]
    last = len(sizes) - 1
    for gone in (
        [],
        [(0, 1)],
        [(0, 0), (0, 2), (last, 1)],
        [(last, expert) for expert in range(sizes[last] - 1)],
    ):
        away = torch.zeros(len(sizes), max(sizes), dtype=torch.bool)
        for layer, expert in gone:
            away[layer, expert] = True
        changes = [Intervention("ablate", layer=layer, expert=expert) for layer, expert in gone]
        with torch.no_grad(), intervene(model.net, *changes):
            logits, routings = moevision.forward_routing(model.net, noise_images(3, seed=7))
        answer = run(noise_images(3, seed=7), away)
        torch.testing.assert_close(answer[0], logits, rtol=0, atol=1e-4)
        routes = answer[2 if known else 1 :]
        *routes, shares = routes
        with torch.no_grad(), intervene(model.net, *changes):
            tokens = model.net.forward_features(noise_images(3, seed=7))
        expected = patch_shares(model.net, tokens).margins()
        torch.testing.assert_close(shares, expected, rtol=0, atol=1e-4)
        assert len(routes) == 3 * len(sizes)
        for place, routing in enumerate(routings):
            index, weights, probs = routes[3 * place : 3 * place + 3]
            first = routing.num_prefix_tokens
            assert index.shape == routing.expert_index[:, first:].shape
            full = torch.zeros_like(probs).scatter(-1, index, weights)
            torch.testing.assert_close(full, routing.expert_weights()[:, first:], rtol=0, atol=1e-5)
            torch.testing.assert_close(probs, routing.probs[:, first:], rtol=0, atol=1e-5)
            chosen = weights > 0
            assert torch.equal(index[chosen], routing.expert_index[:, first:][chosen])
            assert not any(
                bool((index[chosen] == expert).any()) for layer, expert in gone if layer == place
            )
    nobody = torch.zeros(len(sizes), max(sizes), dtype=torch.bool)
    assert all(
        map(torch.equal, run(noise_images(3, seed=7)), run(noise_images(3, seed=7), nobody))
    )  # so it is timed, beside the model
    Image.new("RGB", (32, 32), (250, 120, 60)).save(tmp_path / "image.png")
    lines = template("run_exported.py.jinja").render(file=repr(str(path)), fit="crop", routes=True)
    told: list[str] = []
    exec(
        lines.replace('"image.jpg"', repr(str(tmp_path / "image.png"))), {"print": told.append}
    )  # what export prints
    assert told == list(predict_batch(model, [tmp_path / "image.png"])[0].classes[:1])
    if not known:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        assert [(one.name, one.shape) for one in session.get_inputs()] == [
            ("image", ["batch", 3, 32, 32]),
            ("away", [len(sizes), max(sizes)]),
        ]
        names = [one.name for one in session.get_outputs()]
        assert [*names[:4], names[-1]] == ["logits", "experts.0", "weights.0", "probs.0", "shares"]


@pytest.mark.needs("onnx")
def test_a_second_output_is_the_distance(exported):
    """For any batch size, and the file says what it is."""
    model, path, _ = exported
    assert "nearest class" in exported_facts(model)["distance"]
    assert exported_facts(replace(model, strangers=None))["distance"] is None
    run = export_module.load_exported(path)
    for batch in (1, 3):
        with torch.no_grad():
            expected = answers(model.net, model.strangers, noise_images(3, seed=7)[:batch])
        for found, own in zip(run(noise_images(3, seed=7)[:batch]), expected, strict=True):
            torch.testing.assert_close(found, own, rtol=0, atol=1e-4)
    # whoever asks for the logits alone gets them
    torch.testing.assert_close(
        run_onnx(path, noise_images(3, seed=7)),
        model.net(noise_images(3, seed=7)),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.deep
@pytest.mark.needs("onnx")
def test_fp16_halves_the_file_and_answers_nearly_the_same(exported, tmp_path):
    """Eleven bits of a number are left: logits of a few units move by less than a hundredth."""
    (model, _, whole), path = exported, tmp_path / "model"
    report = export_onnx(model, path, dtype="fp16")
    weights = sum(value.numel() for value in model.net.parameters())
    assert whole.size_bytes - report.size_bytes == pytest.approx(2 * weights, rel=0.1)
    assert 0 < report.max_logit_delta < 0.01
    images = noise_images(5, seed=7)
    logits = run_onnx(path, images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.net(images).detach(), rtol=0, atol=0.01)
    assert next(model.net.parameters()).dtype == torch.float32


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[SavedModel, Path, ExportReport]:
    """One file for several tests, of a converted timm model that was saved and loaded.

    Written with pictures to compare and under an open recorder, which sees nothing.
    """
    home = tmp_path_factory.mktemp("exported")
    deit = timm.create_model("deit_tiny_patch16_224", **SMALL_VIT)
    moe = moevision.convert_to_moe(deit, "every2", 4, 1, router="vmoe_top_k")
    net = with_character(moe).eval()
    save_model(SavedModel(net, NAMES, 32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), home / "saved")
    model, path = with_distances(load_model(str(home / "saved"))), home / "model"
    with moevision.record_routing(model.net) as routings:
        report = export_onnx(model, path, pictures=noise_images(40, seed=7))
        assert routings == []
        model.net(noise_images(1, seed=7))
    assert len(routings) == 2
    return model, path, report


@pytest.mark.deep
@pytest.mark.needs("onnx")
def test_what_is_needed_to_use_a_model_travels_in_the_file(exported):
    model, path, report = exported
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    facts = {
        name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()
    }
    entries = [
        (entry.name, entry.shape) for entry in (*session.get_inputs(), *session.get_outputs())
    ]
    outputs = [("logits", ["batch", 3]), ("distance", ["batch"])]
    assert entries == [("image", ["batch", 3, 32, 32]), *outputs]
    assert (report.pictures, report.top1_agreement) == (44, 1)  # the given pictures too
    assert facts == exported_facts(model)
    assert "resize the short side to 32 px (bicubic" in facts["preprocessing"]
    assert (facts["class_names"], facts["image_size"]) == (NAMES, 32)
    assert (facts["mean"], facts["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    assert (facts["interpolation"], facts["crop_pct"]) == ("bicubic", 1.0)
    assert (facts["moe_config"]["router"], facts["moe_config"]["num_experts"]) == ("vmoe_top_k", 4)
    assert facts["architecture"] == "vit_moe"
    here = str(Path(moevision.__file__).parent).encode()
    assert (
        here not in path.read_bytes()
    )  # exporters write stack traces, with the paths of whoever exported


def odd_images(folder: Path) -> list[Path]:
    """A turned photo, transparency of each kind, 16-bit grey, CMYK, odd sides and a strip; too small to be reduced."""
    pixels = np.random.default_rng(1).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((75, 90), Image.Resampling.BICUBIC)
    grey, alpha = image.convert("L"), Image.linear_gradient("L").resize(image.size)
    translucent = image.copy()
    translucent.putalpha(alpha)
    exif = Image.Exif()
    exif[0x112] = 6  # orientation: to be turned by 90 degrees clockwise
    image.save(folder / "turned.jpg", exif=exif, quality=95)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    translucent.save(folder / "rgba.png")
    Image.merge("LA", [grey, alpha]).save(folder / "la.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(
        folder / "palette.png", transparency=bytes(range(256))
    )
    image.save(folder / "one_colour.png", transparency=image.getpixel((0, 0)))
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "grey16.png")
    image.resize((300, 3)).save(folder / "strip.png")
    image.resize((61, 32)).save(folder / "odd.png")
    return sorted(folder.iterdir())


@pytest.mark.needs("onnx")
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_the_printed_script_answers_as_predict_does(exported, fit, tmp_path):
    model, file, _ = exported
    lines = template("run_exported.py.jinja").render(file=repr(str(file)), fit=fit, routes=False)
    images = odd_images(tmp_path)
    for path, predicted in zip(images, predict_batch(replace(model, fit=fit), images), strict=True):
        names: dict[str, Any] = {"print": lambda name: None}
        exec(lines.replace('"image.jpg"', repr(str(path))), names)
        probability = torch.from_numpy(names["logits"]).softmax(-1)[0]
        own = {name: float(probability[number]) for number, name in enumerate(NAMES)}
        assert [own[name] for name in predicted.classes] == pytest.approx(
            list(predicted.probabilities), abs=1e-4
        ), path
    facts = exported_facts(replace(model, fit=fit))
    assert "16-bit grey divided by 257, what is transparent on white" in facts["preprocessing"]


@pytest.mark.deep
@pytest.mark.needs("onnx")
@pytest.mark.parametrize("error", [2e-4, math.nan])
def test_a_file_that_answers_differently_is_not_kept(error, exported, tmp_path, monkeypatch):
    (model, file, _), load = exported, export_module.load_exported

    def off_by_a_little(source):
        run = load(source)
        off = torch.tensor([0, error, 0])
        return lambda images: (run(images)[0] + off, *run(images)[1:])

    monkeypatch.setattr(export_module, "load_exported", off_by_a_little)
    monkeypatch.setattr(export_module, "_to_bytes", lambda *_: file.read_bytes())
    with pytest.raises(UserError, match=f"by {error:.2g}"):
        export_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    assert {layer.experts.backend for layer in moe_layers(model.net)} == {"auto"}


@pytest.mark.deep
@pytest.mark.needs("onnx")
def test_a_model_that_torch_can_not_trace_is_refused(tmp_path):
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model = tiny(router="vmoe_top_k")
    model.net.norm = nn.Sequential(model.net.norm, Asks())
    with pytest.raises(UserError, match="can't be exported") as caught:
        export_onnx(model, tmp_path / "model.onnx")
    assert caught.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.deep
def test_the_preparation_is_that_of_predict():
    """timm's configuration of these weights says to cut out 95 %; training and predict take the whole square."""
    base = {
        "base": "vit_tiny_patch16_224",
        "img_size": 32,
        "depth": 1,
        "moe_layers": [0],
        "num_experts": 2,
    }
    moe = timm.create_model("vit_moe", **base, num_classes=3)
    dense = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    for net in (moe, dense):
        assert net.pretrained_cfg["crop_pct"] == 0.9
        facts = exported_facts(SavedModel(net, NAMES, 32, (0.5,) * 3, (0.5,) * 3))
        assert (facts["interpolation"], facts["crop_pct"]) == ("bicubic", 1.0)
        assert "resize the short side to 32 px (bicubic" in facts["preprocessing"]


@pytest.mark.deep
@pytest.mark.needs("onnx")
def test_routes_of_a_classifier_without_shares(tmp_path):
    model = tiny(router="vmoe_top_k", class_token=True, global_pool="token")
    export_onnx(model, tmp_path / "model.onnx", routes=True)
    assert (
        len(export_module.load_exported(tmp_path / "model.onnx")(noise_images(2, seed=7)))
        == 1 + 3 * 2
    )


# ---- programs of torch.export

# Run where nothing of this project can be imported.
OPENS = """
import json, sys
sys.modules["moevision"] = sys.modules["timm"] = None
import torch

extra = {"about.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
images = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    answers = [program(images[:batch]) for batch in (1, 3, 5)]
torch.save((answers, extra["about.json"]), sys.argv[3])
"""


def run_elsewhere(path: Path, images: torch.Tensor, folder: Path) -> tuple[list[Any], Any]:
    """What a process without moevision and timm gets for 1, 3 and 5 images, and `about.json`."""
    torch.save(images, folder / "images.pt")
    files = [str(path), str(folder / "images.pt"), str(folder / "answers.pt")]
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", OPENS, *files], check=True)
    answers, about = torch.load(files[2], weights_only=True)
    return answers, json.loads(about)


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param({"router": list(KINDS)}, id="each kind"),
        pytest.param({"router": OTHERS}, id="all other routers", marks=pytest.mark.deep),
        pytest.param(OPTIONS, id="every option", marks=pytest.mark.deep),
    ],
)
def test_a_program_answers_as_the_model_where_moevision_is_missing(layers, tmp_path):
    """In float32 to 1e-5 of the largest logit, for batches that the exporter didn't look at."""
    model = tiny(**layers) if isinstance(layers, dict) else tiny(*layers)
    model = with_distances(replace(model, class_names=["cat", 'a "dog"\n../x', "K\udcff\x1b"]))
    path, images = tmp_path / "model.pt2", noise_images(5, seed=7)
    report = export_program(model, path)
    size = path.stat().st_size
    assert report == ExportReport(path, size, 4, report.max_logit_delta, 1, report.run)

    found, about = run_elsewhere(path, images, tmp_path)
    for batch, outputs in zip((1, 3, 5), found, strict=True):
        with torch.no_grad():
            expected = answers(model.net, model.strangers, images[:batch])
        for output, value in zip(outputs, expected, strict=True):
            assert (output - value).abs().max() <= 1e-5 * value.abs().max()
    assert about == exported_facts(model)
    assert (about["mean"], about["std"], about["image_size"]) == (
        [0.5, 0.4, 0.3],
        [0.2, 0.25, 0.3],
        32,
    )
    assert {layer.experts.backend for layer in moe_layers(model.net)} == {"auto"}


def test_a_program_holds_nothing_of_this_machine_and_no_pickled_weights(tmp_path):
    """Weights and constants are raw numbers, and no name of a part comes from the model."""
    path = tmp_path / "model.pt2"
    model = replace(tiny(router="vmoe_top_k"), class_names=["../a", "b", "c"])
    export_program(model, path)
    here = str(Path(moevision.__file__).parent).encode()
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert not any(".." in name for name in parts)
    assert not any(here in part for part in parts.values())
    weights, constants = (
        json.loads(parts[f"archive/data/{kind}/model_{kind}_config.json"])["config"]
        for kind in ("weights", "constants")
    )
    assert len(weights) > 0
    assert not any(entry["use_pickle"] for entry in (weights | constants).values())


@pytest.mark.deep
def test_a_program_of_half_precision_takes_and_returns_float32(tmp_path):
    model, path = tiny(router="vmoe_top_k"), tmp_path / "model.pt2"
    assert 0 < export_program(model, path, dtype="fp16").max_logit_delta <= 5e-2
    (logits,) = torch.export.load(path).module()(noise_images(3, seed=7))
    assert logits.dtype == torch.float32


@pytest.mark.deep
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_the_printed_script_of_a_program_answers_as_predict_does(fit, tmp_path):
    model, file = replace(tiny(router="vmoe_top_k"), fit=fit), tmp_path / "model.pt2"
    export_program(model, file)
    lines = template("run_exported.py.jinja").render(file=repr(str(file)), fit=fit, routes=False)
    (tmp_path / "images").mkdir()
    images = odd_images(tmp_path / "images")
    for path, predicted in zip(images, predict_batch(model, images), strict=True):
        told: list[str] = []
        exec(lines.replace('"image.jpg"', repr(str(path))), {"print": told.append})
        assert told == list(predicted.classes[:1]), path


def test_a_program_that_answers_differently_is_not_kept(tmp_path, monkeypatch):
    other = tiny(router="vmoe_top_k")
    with torch.no_grad():
        other.net.head.bias[1] += 1
    export_program(other, tmp_path / "other.pt2")
    data = (tmp_path / "other.pt2").read_bytes()
    monkeypatch.setattr(export_module, "_to_pt2", lambda *_: data)
    with pytest.raises(UserError, match="by 1 in a logit"):
        export_program(tiny(router="vmoe_top_k"), tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()
