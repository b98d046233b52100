"""`moevision analyze`: one tiny model analysed once; the page against report.json, its verdicts, what it refuses."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from markupsafe import escape

from moevision.analysis.images import aligned_pictures, cached
from moevision.analysis.information import as_json
from moevision.analysis.questions import A_LITTLE_WORD, LEADS, NOT_MEASURED, NOT_SHOWN, NOTHING, YES
from moevision.analysis.report import (
    ReportSettings,
    analyze,
    claim_folder,
    number,
    render,
    shown_pictures,
    wrong_routes,
)
from moevision.analysis.trace import RoutingTrace
from moevision.demo.html import OFFLINE
from moevision.models.io import save_model
from tests import shared
from tests.analysis.models import saved, small_net
from tests.analysis.pictures import MadePictures

FIGURES = set(
    [
        "overlay_1",
        "overlay_2",
        "overlay_3",
        "load",
        "effects",
        "class_experts_L1",
        "class_experts_L3",
    ]
)
FIGURES |= set(["parts_L1", "parts_L3", "gallery_L1", "gallery_L3"])


def make_run(folder, seed):
    """A run folder with a model of random weights, as `fit` leaves it."""
    net = small_net(seed=seed, class_token=True, global_pool="token")
    with torch.no_grad():  # an untrained model sends all patches the same way
        net.pos_embed.normal_()
        net.head.weight.normal_()
    save_model(saved(net), folder / "model")
    data = {"path": "synthetic_pets", "seed": 0, "root": "data"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed, "data": data}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    return make_run(home / "one", 0), make_run(home / "two", 1)


@pytest.fixture(scope="module")
def report(runs, cli, tmp_path_factory):
    """The folder of a report, its numbers and its page."""
    out = tmp_path_factory.mktemp("analysis") / "report"
    one, two = runs
    options = ("--quick", "--limit=48", "--permutations=40", f"--out={out}")
    outcome = cli("analyze", one, "--seeds", two, "--before", two, *options)
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    assert str(out / "report.html") in outcome.out
    page = (out / "report.html").read_text(encoding="utf-8")
    return out, json.loads((out / "report.json").read_text(encoding="utf-8")), page, outcome


class Page(HTMLParser):
    """Text outside of <data>, the exact values of all <data>, and every attribute that can load something."""

    def __init__(self, page):
        super().__init__()
        self.values, self.shown, self.words, self.loads, self.inside = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.loads += [
            value
            for name, value in attrs
            if name in ("src", "href", "srcset", "action", "data", "poster")
        ]
        if tag == "data":
            self.values.append(json.loads(found["value"]))
        if "alt" in found:
            self.words.append(found["alt"])
        if tag not in ("meta", "img", "br"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag, "tags are closed in order"

    def handle_data(self, text):
        if "data" in self.inside:
            self.shown.append(text)
        elif "style" not in self.inside:
            self.words.append(text)


def leaves(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def digits(text):
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))


def test_every_number_of_the_page_is_in_the_json(report):
    _, numbers, page, _ = report
    known = list(leaves(numbers))
    found = Page(page)
    assert len(found.values) > 100
    exact = {value for value in known if isinstance(value, (int, float))}
    assert set(found.values) <= exact
    # Outside of <data> stand only sentences of report.json, and fixed words, which name no number of this model: those
    # two examples of a number, and the units and labels of the page itself.
    sentences = set().union(*(digits(value) for value in known if isinstance(value, str)))
    fixed = {
        "0",
        "1",
        "3",
    }  # "0 is what the loads alone give, 1 is the same expert", "L1·E3 and L3·E3"
    assert digits(" ".join(found.words)) - sentences - fixed - {"256"} == set()  # SHA-256


def test_a_rounded_number_is_its_exact_value_rounded(report):
    found = Page(report[2])
    for value, shown in zip(found.values, found.shown, strict=True):
        plain = shown.replace("−", "-").replace(",", "")
        scale = 100 if plain.endswith("%") else 1
        plain = plain.rstrip(" %")
        decimals = len(plain.split("e")[0].partition(".")[2])
        step = 10.0 ** (int(plain.split("e")[1]) if "e" in plain else 0) * 10.0**-decimals
        digits_shown = 0.5 * step if decimals or "e" in plain else 0.5
        assert abs(float(plain) - scale * value) <= digits_shown * 1.0001 + 1e-12, (value, shown)


def test_a_layer_that_no_logit_reads_is_named(report):
    """A class-token head: what the last block computes for patches is read by nobody."""
    _, numbers, page, _ = report
    assert [layer["read"] for layer in numbers["layers"]] == [True, False]
    assert re.findall(r"(L\d) \(not read", page) == ["L3"]
    assert numbers["questions"][1]["answers"][2]["answer"] == NOT_MEASURED


def test_the_page_loads_nothing(report):
    for address in Page(report[2]).loads:
        assert address.startswith(("data:image/png;base64,", "#", "http://127.0.0.1:7860/")), (
            address[:60]
        )
    page = re.sub(
        r'srcdoc="[^"]*"|<a href="http://127.0.0.1:7860/[a-z.]*">', "", report[2]
    )  # frames: OFFLINE
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)


def test_live_views_are_frames_that_may_load_nothing(report):
    """One of an image drawn at random, and one of the most frequent mistake."""
    _, numbers, page, _ = report
    frames = [html.unescape(text) for text in re.findall(r'srcdoc="([^"]*)"', page)]
    assert len(frames) == 1 + bool(numbers["wrong"])
    for frame in frames:
        assert f'content="{OFFLINE}"' in frame
        assert "{ details: false }" in frame


def test_mistakes_have_the_distance_of_their_routes_by_hand():
    """Two layers would be alike: one of 2 experts. Wrong ones go 3/4 to expert 0, right cats all, right dogs none."""
    labels = np.array([0] * 6 + [1] * 3)
    said = np.array([1, 1, 1, 0, 0, 0, 1, 1, 1])
    first = np.array([[0, 0, 0, 1]] * 3 + [[0, 0, 0, 0]] * 3 + [[1, 1, 1, 1]] * 3)
    layer = SimpleNamespace(
        kind="token_choice", name="L1", num_experts=2, expert_index=first[..., None]
    )
    names = ("cat", "dog")
    trace = SimpleNamespace(
        labels=labels, predictions=said, class_names=names, prediction_names=names, layers=[layer]
    )
    (found,) = wrong_routes(trace)
    assert (found["label"], found["called"], found["images"], found["index"]) == (
        "cat",
        "dog",
        3,
        [0, 1, 2],
    )
    assert found["layers"] == [{"name": "L1", "to_label": 0.25, "to_other": 0.75}]
    assert wrong_routes(trace, least=4) == []


def test_every_anchor_of_the_contents_exists(report):
    anchors = re.findall(r'href="#([^"]+)"', report[2])
    assert anchors[0] == "verdict"
    assert len(anchors) == 9 + bool(report[1]["wrong"])
    for anchor in anchors:
        assert report[2].count(f'id="{anchor}"') == 1


def test_all_figures_are_there_and_explained(report):
    out, numbers, page, _ = report
    assert {entry["file"] for entry in numbers["figures"]} == {f"{name}.png" for name in FIGURES}
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{name}.png" for name in FIGURES
    }
    for entry in numbers["figures"]:
        assert f'alt="{entry["title"]}"' in page
    assert (
        page.count("<b>How to read")
        == page.count("What it does not show.")
        == page.count("<figcaption>")
    )


def test_the_numbers_are_those_of_the_trace(report):
    out, numbers, _, _ = report
    trace = RoutingTrace.load(out / "trace.safetensors")
    assert numbers["schema"] == "moevision.report/1"
    assert numbers["data"]["n_images"] == len(trace) == 48
    assert numbers["data"]["correct"] == int((trace.predictions == trace.labels).sum())
    for found, layer in zip(numbers["layers"], trace.layers, strict=True):
        counts = [int((layer.expert_index == expert).sum()) for expert in range(4)]
        assert found["counts"] == counts
        assert found["slowest"] == pytest.approx(max(counts) / (sum(counts) / 4))
        assert found["cv_squared"] == pytest.approx(np.var(counts) / np.mean(counts) ** 2)
        assert found["margin"] == pytest.approx(float(layer.margin.mean()), rel=1e-5)
    assert sum(row["n"] for row in numbers["data"]["classes"]) == 48
    effects = numbers["effects"]
    assert len(effects["rows"]) == 2 * 4 * 8  # layers, experts, classes
    for expert in effects["experts"]:
        own = [
            row
            for row in effects["rows"]
            if (row["layer"], row["expert"]) == (expert["layer"], expert["expert"])
        ]
        assert expert["delta_logit"] == pytest.approx(sum(row["delta_logit"] for row in own) / 8)
        assert abs(expert["strongest_delta_logit"]) == max(abs(row["delta_logit"]) for row in own)


def test_it_says_where_it_comes_from(report):
    _, numbers, page, _ = report
    facts = numbers["provenance"]
    assert facts["command"].startswith("moevision analyze ")
    assert facts["seed"] == 0
    assert len(facts["weights_sha256"]) == 64
    assert facts["weights_sha256"] in page
    assert facts["libraries"]["torch"] == version("torch")
    assert numbers["settings"]["seeds"] == ["two"]


def test_the_three_answers_are_printed_and_stand_first(report):
    _, numbers, page, outcome = report
    answers = numbers["verdict"]["answers"]
    assert [answer["question"] for answer in answers] == list(LEADS)
    assert outcome.out.splitlines()[:3] == [answer["sentence"] for answer in answers]
    plain = numbers["verdict"]["plain"]
    assert not digits(plain)
    first, _, details = page.partition('<details id="details">')
    assert first.index(escape(plain)) < first.index('id="verdict"')
    headings = [re.findall(r'<h2 id="([a-z]+)-title">', part) for part in (first, details)]
    assert headings[0] == ["verdict", "pictures", "limits"]
    assert len(headings[1]) == 6
    open_text = re.sub(r"<details>.*?</details>", "", first, flags=re.DOTALL)
    assert not [
        answer for answer in answers if str(escape(answer["sentence"])) in open_text
    ]  # its numbers are folded
    for answer in answers:
        assert answer["answer"] in (YES, A_LITTLE_WORD, NOT_SHOWN, NOTHING, NOT_MEASURED)
        assert page.index(str(escape(answer["sentence"]))) < page.index('<h2 id="pictures-title">')
    for layer, found in zip(numbers["verdict"]["layers"], numbers["questions"], strict=True):
        assert [f"{layer['name']}: {answer['sentence']}" for answer in found["answers"]] == layer[
            "sentences"
        ]
        assert len(found["trainings"]) == 2  # this one and the other, each against its own controls
        assert [reading["unit"] for reading in found["controls"]["before"]] == [
            "patch",
            "image",
        ]  # one, from --before
        assert found["load"]["share"] == pytest.approx(
            numbers["layers"][numbers["questions"].index(found)]["share"]
        )
    assert "no learned specialization" not in (page + outcome.out).lower()


def test_a_report_replaces_a_former_one_only(report, runs, tmp_path, monkeypatch):
    out, numbers, _, _ = report
    again = shutil.copytree(out, tmp_path / "report")
    stale, mine = again / "figures" / "old.png", again / "notes.txt"
    stale.write_bytes(b"of a former report")
    mine.write_text("mine")
    former = dict(numbers, figures=[*numbers["figures"], {"file": "old.png"}])
    (again / "report.json").write_text(json.dumps(former))
    (again / "report.html").write_text("old")
    monkeypatch.setattr("moevision.analysis.report.draw_figures", lambda *measured: [])
    analyze(
        ReportSettings(
            str(runs[0]), out=again, limit=20, permutations=20, quick=True, progress=False
        )
    )
    assert (again / "report.html").read_text() != "old"
    assert not stale.exists()
    assert not list((again / "figures").iterdir()), (
        "nor are figures kept that the new report doesn't have"
    )
    assert mine.read_text() == "mine"
    assert not list(again.rglob("*.tmp"))
    (first, *_) = json.loads((again / "report.json").read_text())["questions"]
    assert len(first["trainings"]) == 1  # without --seeds


def test_a_run_that_is_interrupted_leaves_no_page_of_another_model(
    report, runs, tmp_path, monkeypatch
):
    """The trace is already the new one: a page stands beside the files that it was made with, or not at all."""
    again = shutil.copytree(report[0], tmp_path / "report")
    before = (again / "trace.safetensors").read_bytes()

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("moevision.analysis.report.render", stop)
    monkeypatch.setattr("moevision.analysis.report.draw_figures", lambda *measured: [])
    with pytest.raises(KeyboardInterrupt):
        analyze(
            ReportSettings(
                str(runs[0]), out=again, limit=20, permutations=20, quick=True, progress=False
            )
        )
    assert (again / "trace.safetensors").read_bytes() != before
    assert not (again / "report.html").exists()
    (again / "report.json").unlink()
    assert (
        claim_folder(again) == again
    )  # what an interrupted first run leaves is no obstacle to the next


def refused(outcome, *words):
    assert shared.refused(outcome, *words).err.count("\n") == 1


def test_what_it_refuses(cli, runs, tmp_path):
    model = shutil.copytree(runs[0] / "model", tmp_path / "model")
    data = "--data=synthetic_pets"
    refused(cli("analyze", tmp_path / "nowhere", data), "nowhere", "no run or model")
    refused(cli("analyze", model), "--data", "one subfolder per class")
    refused(cli("analyze", model, f"--data={tmp_path / 'none'}"), "none")
    elsewhere = cli("analyze", model, "--data=cifar10", f"--root={tmp_path}")
    fetch = f"moevision fit cifar10 --data.download true --data.root {tmp_path}"
    refused(elsewhere, f"cifar10 is not in {tmp_path}: fetch it by `{fetch}`, or")
    refused(cli("analyze", model, data, "--limit=0"), "--limit is 0", "at least 20")
    refused(cli("analyze", model, data, "--permutations=3"), "--permutations is 3")
    refused(
        cli("analyze", runs[0], f"--seeds={tmp_path / 'gone'}", f"--out={tmp_path / 'o'}"), "gone"
    )
    for seeds in (runs[:1], (runs[1], runs[1] / "model")):  # the run itself, and another one twice
        outcome = cli("analyze", runs[0], "--seeds", *seeds, f"--out={tmp_path / 'o'}")
        refused(outcome, f"{seeds[-1]} has the seed of {seeds[0]}", "--seed_everything")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    refused(cli("analyze", runs[0], f"--out={tmp_path / 'thesis'}"), "chapter.tex", "new folder")
    (tmp_path / "file").touch()
    refused(cli("analyze", runs[0], f"--out={tmp_path / 'file'}"), "File exists", "folder")
    assert not (tmp_path / "o").exists(), "nothing is made before the model is known to be there"


def test_a_model_without_experts(cli, tmp_path):
    net = timm.create_model("test_vit_moe", num_classes=8, moe_layers=[]).eval()
    save_model(saved(net), tmp_path / "dense")
    outcome = cli("analyze", tmp_path / "dense", "--data=synthetic_pets", f"--out={tmp_path / 'o'}")
    refused(outcome, "no MoE layers")
    assert not (tmp_path / "o").exists()


def test_help_teaches(cli):
    outcome = cli("analyze", "--help")
    assert (outcome.code, outcome.err) == (0, "")
    shared.says(outcome.out, "report.html", "--seeds", "three questions", "--before", "--quick")
    shared.says(outcome.out.lower(), "examples", "routingtrace.load")


@pytest.mark.parametrize("answer", [YES, A_LITTLE_WORD, NOT_SHOWN, NOTHING, NOT_MEASURED])
def test_each_answer_has_its_box(report, answer):
    _, numbers, _, _ = report
    other = json.loads(json.dumps(numbers))
    other["figures"], other["verdict"]["answers"][1]["answer"] = [], answer
    assert f'<div class="verdict {answer.replace(" ", "-")}">' in render(other, {})


def test_its_commands_can_be_copied(report):
    _, numbers, _, _ = report
    other = json.loads(json.dumps(numbers))
    other["figures"], other["model"]["address"] = [], "runs/my run"
    other["wrong"] = [{"label": "cat", "called": "dog", "images": 3, "layers": []}]
    assert escape("demo 'runs/my run'") in render(other, {})


def test_names_from_outside_stay_text(report):
    _, numbers, _, _ = report
    hostile = "<script>alert('x')</script>\" onload=\"x\u202e{{ title }}"
    other = json.loads(json.dumps(numbers))
    other["figures"], other["title"] = [], hostile
    other["model"]["name"] = other["data"]["name"] = hostile
    other["data"]["classes"][0]["class"] = hostile
    other["effects"]["experts"][0]["strongest_class"] = hostile
    other["verdict"]["layers"][0]["sentences"] = [hostile]
    page = render(other, {})
    assert "<script" not in page
    assert "\u202e" not in page
    shown = hostile.replace("\u202e", "\\u202e")
    assert "".join(Page(page).words).count(shown) >= 6


# ---- small parts: how numbers are shown, which images are, and that images are read once


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (0.98765, ".1%", "98.8 %"),
        (-0.1234, "+.2f", "−0.12"),
        (-0.0001, "+.2f", "0.00"),
        (1234, ",", "1,234"),
        (0.0123, ".2g", "0.012"),
    ],
)
def test_numbers_are_shown_rounded_and_kept_exactly(value, form, shown):
    assert number(value, form) == f'<data value="{value}">{shown}</data>'


def test_no_number_is_a_dash():
    assert "–" in number(None)


def test_what_json_can_not_say_is_null():
    values = {
        "a": np.float32(1.5),
        "b": np.array([1, 2]),
        "c": float("nan"),
        "d": (np.bool_(True), float("inf")),
    }
    assert as_json(values) == {"a": 1.5, "b": [1, 2], "c": None, "d": [True, None]}


def test_shown_pictures_are_of_different_classes(make_trace):
    trace = make_trace(
        np.zeros((9, 4, 1)), labels=[0, 0, 0, 0, 0, 0, 0, 1, 2], num_experts=2, grid=(2, 2)
    )
    for seed in range(20):
        shown = shown_pictures(trace, seed)
        assert sorted(trace.labels[shown]) == [0, 1, 2]
    assert {shown_pictures(trace, seed)[0] for seed in range(50)} >= {7, 8}, (
        "the first is not always of class 0"
    )


@pytest.fixture
def reads():
    """Images that were read, in order."""
    return []


@pytest.fixture
def ten(reads):
    """Ten images, each a list of reads."""

    def image(index):
        reads.append(index)
        return np.full((8, 8, 3), index, np.uint8)

    return MadePictures(10, image, ("cat", "dog"))


def test_pictures_follow_the_trace(ten, make_trace):
    trace = make_trace(np.zeros((10, 4, 1)), labels=np.arange(10) % 2, num_experts=2, grid=(2, 2))
    assert aligned_pictures(ten, trace) is ten
    some = aligned_pictures(ten, trace.select([7, 2]))
    assert [int(some.image(index)[0, 0, 0]) for index in range(len(some))] == [7, 2]
    assert [some.label(index) for index in range(2)] == [1, 0]


def test_pictures_are_read_once(ten, reads):
    pictures = cached(ten)
    for _ in range(3):
        assert [int(pictures.image(index)[0, 0, 0]) for index in range(10)] == list(range(10))
    assert reads == list(range(10))
    some = cached(ten, max_bytes=8 * 8 * 3 + 5)  # the first fits, the second doesn't
    for _ in range(3):
        assert (int(some.image(0)[0, 0, 0]), int(some.image(1)[0, 0, 0])) == (0, 1)
    assert reads[10:] == [0, 1, 1, 1]
    assert (len(some), some.label(3), some.picture_name(3)) == (10, 1, "picture 3")
