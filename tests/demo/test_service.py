"""`Explorer` without a web server: every answer is recomputed from the model, and every bad request is refused."""

import base64
import io
import json
import shutil
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from moevision.analysis.effects import class_effect, effect
from moevision.analysis.images import View, open_pictures, original_image
from moevision.analysis.intervention import Intervention
from moevision.data import SyntheticPets
from moevision.demo import galleries as galleries_module
from moevision.demo import route_image, service
from moevision.demo.atlas import compare_by_atlas
from moevision.demo.examples import Examples, photo_files
from moevision.demo.facts import SHARP_PX, sharp_square
from moevision.demo.galleries import Galleries, read_into_memory
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer, ood_message
from moevision.demo.view import Settings
from moevision.demo.wire import open_data_uri
from moevision.errors import UserError
from moevision.models.io import save_model
from moevision.models.ood import answers
from tests.demo.conftest import SIZE, make_model, png, usual_pets
from tests.scopes import ablate
from tests.shared import says

PICTURE = {"kind": "example", "id": "pets/test/3"}
ABLATE = {"kind": "ablate", "layer": 3, "expert": 1}


def good(explorer, name, **request):
    answer = explorer.answer(name, request)
    assert "error" not in answer, answer
    json.dumps(answer, allow_nan=False)
    return answer


def gallery_of(explorer):
    return explorer.galleries.gallery(explorer.entries["pets"].variants["trained"])


def saved(explorer, variant="trained", model="pets"):
    return explorer.entries[model].variants[variant].saved


def test_boot_tells_everything_that_the_page_needs(explorer):
    boot = good(explorer, "boot")
    assert set(boot) == {"version", "local", "models", "limits", "links", "default"}
    assert boot["default"] == {"model": "pets", "picture": "pets/test/0"}
    pets, photos = boot["models"]
    assert (pets["id"], photos["id"]) == ("pets", "photos")
    assert pets["variants"] == ["trained", "untrained"]
    assert {pets["has_dense"], pets["can_search"]} == {True}
    assert "accuracy_text" not in pets  # each variant has its own
    texts = {
        name: variant.facts.accuracy_text
        for name, variant in explorer.entries["pets"].variants.items()
    }
    assert pets["accuracy_texts"] == texts
    assert says(texts["trained"], "12.5 %", "dense twin: 13.0 %")
    assert len(set(texts.values())) == 2
    # classes take turns: the first eight examples show the eight classes
    assert [example["label"] for example in pets["examples"][:8]] == list(SyntheticPets.classes)
    assert [example["id"] for example in photos["examples"]] == [*photo_files()]
    assert all(example["id"].startswith("photo/") for example in photos["examples"])
    assert all(example["label"] is None for example in photos["examples"])
    assert len(photos["examples"]) >= 3


def test_route_answers_what_route_image_computes(explorer, pixels):
    answer = good(explorer, "route", model="pets", picture=PICTURE)
    entry = explorer.entries["pets"]
    alone = route_image(saved(explorer), pixels, dense=entry.dense).to_json()
    for part in ("layers", "prediction", "settings"):
        assert answer[part] == alone[part]
    assert answer["picture"]["src"] == alone["picture"]["src"]
    assert answer["picture"]["label"] == "bear"
    assert answer["picture"]["id"] == "pets/test/3"
    assert answer["model"]["variant"] == "trained"


def test_an_example_is_routed_once_for_everybody(explorer, pixels):
    """As trained; whatever a visitor sets or brings is computed anew."""
    net = explorer.entries["pets"].variants["trained"].saved.net
    upload = {"kind": "upload", "data": png(pixels)}
    passes = []
    handle = net.register_forward_hook(lambda *_: passes.append(1))
    try:
        answers = [good(explorer, "route", model="pets", picture=PICTURE) for _ in range(3)]
        assert len(passes) <= 1, "another test may have asked before"
        assert answers[0] == answers[1] == answers[2]
        passes.clear()
        for request in ({"picture": PICTURE, "top_k": 1}, {"picture": upload}) * 2:
            good(explorer, "route", model="pets", **request)
        assert len(passes) == 4
    finally:
        handle.remove()


def test_more_examples_follow_the_first_ones(explorer):
    pets = explorer.answer("boot", {})["models"][0]
    assert (len(pets["examples"]), pets["num_examples"], pets["shown"]) == (12, 2000, "")
    more = good(explorer, "examples", model="pets", start=12)["examples"]
    assert [example["id"] for example in more] == [
        f"pets/test/{index}" for index in range(12, 36)
    ]  # labels in turn
    assert good(explorer, "examples", model="pets", start=2000)["examples"] == []


def test_a_damaged_image_is_left_out_of_the_examples(drawn_pets, tmp_path, caplog):
    pets = shutil.copytree(drawn_pets, tmp_path / "pets")
    save_model(make_model(num_classes=2), tmp_path / "model")
    (entry,) = open_entries(str(tmp_path / "model"), str(pets))
    whole = list(entry.examples.all_ids)  # 40
    for id in (whole[0], whole[20]):
        (pets / id.removeprefix("data/")).write_bytes(b"\x89PNG, and no more")
    explorer = Explorer([entry])
    explorer.warm()
    model = explorer.start_boot()["models"][0]
    ours = [one["id"] for one in model["examples"] if not one["id"].startswith("photo/")]
    assert ours == whole[1:12]
    assert [view["picture"]["id"] for view in explorer.start_views()] == [whole[1]]
    assert model["num_examples"] == 39
    more = good(explorer, "examples", model=model["id"], start=11)
    assert [one["id"] for one in more["examples"]] == whole[12:20] + whole[21:36]
    assert more["num_examples"] == 38
    rest = good(explorer, "examples", model=model["id"], start=11 + 23)
    assert [one["id"] for one in rest["examples"]] == whole[36:]
    assert caplog.text.count("left out of") == 2


def pixels_of(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_what_lies_under_the_patches_is_the_same_square_in_more_pixels(photos_home):
    (entry,) = open_entries(None, home=photos_home)
    photos = Explorer([entry], Galleries([entry], limit=3))
    for id in entry.examples.all_ids:
        sharp = pixels_of(good(photos, "sharp", picture=id)["src"])
        assert sharp.shape == (96, 96, 3)  # as the file is: never enlarged
        again = np.asarray(
            Image.fromarray(sharp).resize((32, 32), Image.Resampling.BICUBIC)
        ).astype(float)
        assert (
            np.abs(again - entry.examples.find(id).pixels).mean() < 3
        )  # grey levels; JPEG and rounding


def test_what_lies_under_the_patches_is_bounded_and_never_enlarged():
    wide = Image.effect_mandelbrot((1500, 1000), (-2, -1, 1, 1), 60).convert("RGB")
    sharp = sharp_square(wide, 32)
    assert sharp.shape == (SHARP_PX, SHARP_PX, 3)
    middle = wide.crop((250, 0, 1250, 1000)).resize((SHARP_PX, SHARP_PX), Image.Resampling.BICUBIC)
    assert np.abs(sharp.astype(float) - np.asarray(middle)).mean() < 1
    assert sharp_square(wide, 672) is None
    assert sharp_square(wide.resize((40, 33)), 32).shape == (33, 33, 3)
    assert sharp_square(wide.resize((40, 32)), 32) is None


def test_a_drawn_image_is_drawn_again_in_more_pixels(explorer):
    """The same scene; pixels of the model's size are its mean but for the grain, which is drawn pixel by pixel."""
    large = pixels_of(good(explorer, "sharp", model="pets", picture="pets/test/3")["src"])
    assert large.shape == (SHARP_PX, SHARP_PX, 3)
    small = np.asarray(Image.fromarray(large).resize((32, 32), Image.Resampling.BOX)).astype(float)
    ours, other = (
        explorer.entries["pets"].examples.find(f"pets/test/{n}").pixels for n in (3, 11)
    )  # of one class
    assert np.abs(small - ours).mean() < 10
    assert np.abs(small - other).mean() > 25
    lion = pixels_of(good(explorer, "sharp", model="photos", picture="photo/lion")["src"])
    assert 32 < len(lion) <= SHARP_PX


def test_a_labelled_folder_has_its_originals(tmp_path):
    """Labels of the model's are a view of the folder's own; the original is behind both."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.effect_mandelbrot((80, 60), (-2, -1, 1, 1), 60).convert("RGB").save(
            tmp_path / name / "one.png"
        )
    pictures = open_pictures(tmp_path, 32, split="all", class_names=["dog", "cat"])
    assert original_image(pictures, 0, 672).size == (80, 60)
    assert original_image(open_pictures("synthetic_pets", 32), 0, 672).size == (672, 672)


def test_an_upload_is_routed_like_the_example(explorer, pixels):
    upload = {"kind": "upload", "data": png(pixels)}
    ours, theirs = (
        good(explorer, "route", model="pets", picture=picture) for picture in (upload, PICTURE)
    )
    assert ours["layers"] == theirs["layers"]
    assert ours["picture"]["id"] is None
    assert ours["picture"]["label"] is None


@pytest.mark.parametrize("size", [(1, 1), (15, 40), (3000, 3), (336, 16)])
def test_an_image_that_shows_nothing_is_refused_with_a_sentence(explorer, make, size):
    image, said = Image.new("RGB", size, (200, 60, 20)), "{} × {}".format(*size)
    answer = explorer.answer(
        "route", {"picture": {"kind": "upload", "data": png(np.asarray(image))}}
    )
    assert answer["code"] == "bad_image"
    assert f"{said} px" in answer["error"]
    with pytest.raises(UserError, match=f"{said} px"):
        route_image(make(), image)


def test_an_icon_and_a_panorama_are_routed(explorer):
    for height, width in ((16, 16), (20, 400)):
        good(
            explorer,
            "route",
            picture={"kind": "upload", "data": png(np.zeros((height, width, 3), np.uint8))},
        )
    assert good(explorer, "boot")["limits"]["min_side"] == 16


@pytest.mark.parametrize("variant", ["trained", "untrained"])
def test_variants_are_different_networks(explorer, pixels, variant):
    answer = good(explorer, "route", model="pets", variant=variant, picture=PICTURE)
    assert answer["layers"] == route_image(saved(explorer, variant), pixels).to_json()["layers"]
    others = {"trained", "untrained"} - {variant}
    assert all(
        answer["layers"] != good(explorer, "route", variant=o, picture=PICTURE)["layers"]
        for o in others
    )
    assert (answer["prediction"]["dense"] is not None) == (variant == "trained")


def test_untrained_is_the_same_at_every_start(explorer, home, pixels):
    again = open_entries(None, home=home)[0].variants["untrained"].saved
    ours = route_image(again, pixels).to_json()
    assert ours["layers"] == good(explorer, "route", variant="untrained", picture=PICTURE)["layers"]


def test_settings_reach_the_model(explorer, pixels):
    request = {"top_k": 3, "capacity": 0.75, "intervention": ABLATE, "noise": 7}
    answer = good(explorer, "route", model="pets", picture=PICTURE, **request)
    change = Intervention("ablate", layer=3, expert=1)
    expected = route_image(saved(explorer), pixels, settings=Settings(3, 0.75, change, 7)).to_json()
    assert answer["layers"] == expected["layers"]
    assert answer["settings"]["off_distribution"]


def test_several_experts_may_be_away(explorer, pixels):
    """As if they were taken away one inside the other; without all of them a layer adds nothing to any patch."""
    two = good(explorer, "route", picture=PICTURE, away=[[3, 1], [3, 2]])
    model = saved(explorer)
    with ablate(model.net, 3, 1), ablate(model.net, 3, 2):
        expected = route_image(model, pixels).to_json()
    assert two["layers"] == expected["layers"]
    assert two["prediction"]["moe"] == expected["prediction"]["moe"]
    assert two["settings"]["away"] == [[3, 1], [3, 2]]
    assert two["settings"]["off_distribution"]
    none = good(explorer, "route", picture=PICTURE, away=[[3, expert] for expert in range(4)])[
        "layers"
    ][1]
    assert not np.any(none["kept"])
    assert not np.any(none["weights"])


def test_noise_needs_a_router_that_has_it(bundle, tmp_path):
    bundle(tmp_path, twins=False, router="sigmoid")
    quiet = Explorer(open_entries(None, home=tmp_path))
    assert "have no noise" in quiet.answer("route", {"picture": PICTURE, "noise": 1})["error"]


def test_bundled_weights_are_bfloat16_on_disk_and_float32_in_memory(explorer, home):
    import safetensors.torch

    stored = safetensors.torch.load_file(home / "pets" / "trained" / "model.safetensors")
    assert {str(value.dtype) for value in stored.values() if value.is_floating_point()} == {
        "torch.bfloat16"
    }
    assert {str(value.dtype) for value in saved(explorer).net.parameters()} == {"torch.float32"}


CHANGES = [
    ({"kind": "ablate", "layer": 3, "expert": 1}, []),
    ({"kind": "swap", "layer": 3, "expert": 1, "other": 2}, []),
    ({"kind": "random", "layer": None, "seed": 5}, []),
    ({"kind": "force", "layer": 3, "expert": 2}, [[1, 0]]),
]


@pytest.mark.parametrize(("change", "away"), CHANGES)
def test_what_if_answers_what_effect_measures(explorer, pixels, change, away):
    """Without the experts that are away, as the view beside it is computed; over images of a class too."""
    request = {"model": "pets", "intervention": change, "away": away}
    answer = good(explorer, "what_if", picture=PICTURE, **request)
    model, pictures = saved(explorer), gallery_of(explorer).pictures
    with ExitStack() as scopes:
        for layer, expert in away:
            scopes.enter_context(ablate(model.net, layer, expert))
        alone = effect(model, pixels, Intervention(**change))
        of_class = class_effect(model, pictures, "bear", Intervention(**change), limit=50).to_json()
    assert answer["intervention"] == alone.to_json()["intervention"]
    assert answer["delta_logit"] == pytest.approx(alone.delta_logit)
    assert answer["moved"] == alone.moved
    assert answer["control"]["deltas"] == pytest.approx(list(alone.control.delta_logits))
    assert answer["target"] == alone.class_names[alone.target]
    view = good(explorer, "route", picture=PICTURE, **request)
    shares = {one["class"]: one["p"] for one in view["prediction"]["moe"]}
    assert [shares[one["class"]] for one in answer["after"]] == pytest.approx(
        [one["p"] for one in answer["after"]], abs=1e-4
    )
    assert view["settings"]["intervention"].items() >= change.items()
    found = good(explorer, "class_effect", **request, **{"class": "bear"})["class_effect"]
    assert {**found, "delta_logit": 0} == {**of_class, "delta_logit": 0}
    assert found["delta_logit"] == pytest.approx(of_class["delta_logit"]) != 0


def test_an_unmeasured_answer_names_the_command_of_its_run(explorer, monkeypatch):
    entry = replace(explorer.entries["pets"], address="'runs/my run'")
    monkeypatch.setitem(explorer.entries, "pets", entry)
    atlas = explorer.galleries.atlas(entry.variants["trained"])
    sentence = (
        "The experts do different things: not measured (`moevision analyze MODEL` measures it)."
    )
    layers = [
        {**layer, "answers": [{"answer": "not measured", "sentence": sentence}]}
        for layer in atlas["layers"]
    ]
    monkeypatch.setattr(explorer.galleries, "atlas", lambda *_: {**atlas, "layers": layers})
    told = good(explorer, "classes", model="pets")["layers"][0]["answers"][0]["sentence"]
    assert says(told, "moevision analyze 'runs/my run'")


@pytest.mark.parametrize("variant", ["trained", "untrained"])
def test_experts_show_their_own_patches(explorer, variant):
    page = good(explorer, "experts", model="pets", variant=variant, layer=3)
    assert page["status"] == "ready"
    assert sum(expert["load_share"] for expert in page["experts"]) == pytest.approx(1, abs=1e-3)
    assert {expert["ideal_share"] for expert in page["experts"]} == {0.25}
    for expert in page["experts"]:
        assert expert["name"] == f"L3·E{expert['expert']}"
        for patch in [*expert["top"], *expert["random"]]:
            request = {
                "model": "pets",
                "variant": variant,
                "picture": {"kind": "example", "id": patch["picture"]},
            }
            layer = explorer.answer("route", request)["layers"][1]
            place = layer["experts"][patch["patch"]].index(expert["expert"])
            assert layer["weights"][patch["patch"]][place] == pytest.approx(
                patch["weight"], abs=1e-3
            )


def test_a_crop_has_the_patch_in_its_box(explorer):
    patch = good(explorer, "experts", model="pets", layer=1)["experts"][0]["top"][0]
    picture = explorer.entries["pets"].examples.find(patch["picture"])
    crop = np.asarray(open_data_uri(patch["crop"])).astype(int)
    row, column = divmod(patch["patch"], 4)
    x, y, width, height = (round(value * len(crop)) for value in patch["box"])
    inside = crop[y : y + height, x : x + width]
    original = picture.pixels[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
    assert inside.shape == original.shape
    assert np.abs(inside - original).mean() < 8  # a JPEG at quality 90
    assert patch["label"] == picture.label


def test_classes_are_the_atlas(explorer):
    page = good(explorer, "classes", model="pets")
    trace = gallery_of(explorer).trace
    assert (page["status"], page["n_images"]) == ("ready", 160)
    counts = trace.layer(3).counts()
    shares = counts / counts.sum(1, keepdims=True)
    for label, row in enumerate(page["layers"][1]["share"]):
        assert row == pytest.approx(shares[trace.labels == label].mean(0), abs=1e-3)
    for layer, found in zip(page["layers"], trace.layers, strict=True):
        answers = layer["answers"]
        assert [answer["question"] for answer in answers] == ["experts", "training", "function"]
        # of a half of the images that it wasn't counted on, as `analyze` says it
        assert says(answers[0]["detail"], "the expert alone")
        # nothing was compared with untrained models here, and no route was forced
        assert [answer["answer"] for answer in answers[1:]] == ["not measured", "not measured"]
        load = found.counts().sum(0)
        assert layer["load_words"].startswith(
            f"max/mean load {load.max() / load.mean():.2f}, in effect "
        )


def test_the_atlas_answers_about_more_images_than_are_carried():
    """The photo model has three cats and five dogs, and in its atlas 1,000 photos of eleven classes, 91 of either."""
    (entry,) = [entry for entry in open_entries(None) if entry.card.id == "photos"]
    explorer = Explorer([entry], Galleries([entry]))
    atlas = explorer.galleries.atlas(entry.variants["trained"])
    page = good(explorer, "compare", a="dog", b="cat")
    assert (page["n_a"], page["n_b"]) == (91, 91)
    for layer, of in zip(page["layers"], atlas["layers"], strict=True):
        cat, dog = (atlas["class_names"].index(name) for name in ("cat", "dog"))
        share, significant = (np.array(of["map"][name]) for name in ("share", "significant"))
        rows = layer["experts"]
        assert [row["difference"] for row in rows] == pytest.approx(share[dog] - share[cat])
        stands_out = significant[dog] | significant[cat]
        assert [row["significant"] for row in rows] == stands_out.tolist()
    change = {"kind": "ablate", "layer": 8, "expert": 0, "fill": "next_best", "seed": 0}
    answer = good(explorer, "class_effect", intervention=change, **{"class": "cat"})
    assert answer == {"class_effect": None, "without": atlas["layers"][0]["experts"][0]["without"]}
    other = good(
        explorer, "class_effect", intervention={**change, "fill": "zero"}, **{"class": "cat"}
    )
    assert other == {"class_effect": None, "without": None}  # the atlas measured the next best
    with pytest.raises(UserError, match="cat or of owl"):
        compare_by_atlas(atlas, "cat", "owl")


def test_a_cell_opens_on_its_heaviest_pictures(explorer):
    page = good(explorer, "cell", model="pets", layer=3, expert=2, **{"class": "dog"})
    shares = [picture["share"] for picture in page["pictures"]]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 12
    for picture in page["pictures"]:
        assert picture["label"] == "dog"
        view = good(explorer, "route", picture={"kind": "example", "id": picture["id"]})
        assert view["layers"][1]["counts"][2] / 32 == pytest.approx(picture["share"], abs=1e-4)


def test_mistakes_are_those_of_the_trace_with_their_routes(explorer, monkeypatch):
    """Four images of the first class are called the second; all else is right. The distances in L3 by hand."""
    gallery = gallery_of(explorer)
    labels, said = gallery.trace.labels, gallery.trace.labels.copy()
    own, its = (np.flatnonzero(labels == label) for label in (0, 1))
    said[own[:4]] = 1
    changed = replace(gallery, trace=replace(gallery.trace, predictions=said))
    monkeypatch.setattr(explorer.galleries, "gallery", lambda *_: changed)
    (group,) = good(explorer, "mistakes", model="pets")["groups"]
    assert (group["label"], group["called"], group["images"]) == ("cat", "dog", 4)
    assert len(group["pictures"]) == 4
    shown = good(explorer, "route", picture={"kind": "example", "id": group["pictures"][0]["id"]})
    assert shown["picture"]["label"] == "cat"
    first = np.asarray(gallery.trace.layer(3).expert_index)[..., 0]
    wrong, right, other = (
        np.bincount(first[rows].ravel(), minlength=4) / first[rows].size
        for rows in (own[:4], own[4:], its)
    )
    told = next(layer for layer in group["layers"] if layer["name"] == "L3")
    assert told["to_label"] == pytest.approx(abs(wrong - right).sum() / 2)
    assert told["to_other"] == pytest.approx(abs(wrong - other).sum() / 2)


def test_export_is_one_page_without_a_network(explorer):
    page = good(explorer, "export_html", model="pets", picture=PICTURE)
    assert page["filename"] == "moevision-pets-bear-test-3.html"
    assert "http://" not in page["html"].replace("http://www.w3.org", "")
    assert "https://" not in page["html"]
    hostile = {"kind": "example", "id": "photo/lion"}
    assert (
        good(explorer, "export_html", model="photos", picture=hostile)["filename"]
        == "moevision-photos-lion.html"
    )


def test_a_model_without_pictures_says_so(explorer):
    for name, request in (("experts", {"layer": 1}), ("classes", {})):
        page = good(explorer, name, model="photos", **request)
        assert page["status"] == "no_pictures"
        assert "--data" in page["note"]


def test_before_the_gallery_is_ready(home):
    entries = open_entries(None, home=home)
    explorer = Explorer(entries, Galleries(entries))  # never started
    assert explorer.answer("experts", {"model": "pets", "layer": 1})["status"] == "computing"
    assert explorer.answer("classes", {"model": "pets"})["status"] == "computing"
    request = {"model": "pets", "intervention": ABLATE, "class": "bear"}
    assert explorer.answer("class_effect", request) == {"class_effect": None, "without": None}


def test_a_gallery_that_fails_says_why(home, monkeypatch):
    entries = open_entries(None, home=home)
    explorer = Explorer(entries, Galleries(entries, limit=0))
    explorer.galleries.start()
    explorer.galleries.thread.join(60)
    answer = explorer.answer("experts", {"model": "pets", "layer": 1})
    assert says(answer["error"], "The pets", "0 images can be read")
    assert "error" not in explorer.answer("route", {"picture": PICTURE})


class Slow(View):
    """Images that take a while to be read."""

    def __init__(self, pictures):
        classes = pictures.class_names
        super().__init__(
            pictures, range(len(pictures)), classes, range(len(classes)), pictures.name
        )
        self.asked = threading.Event()

    def image(self, index):
        self.asked.set()
        time.sleep(0.05)
        return super().image(index)


def test_a_closed_explorer_reads_no_more_images(home):
    entry = open_entries(None, home=home)[0]
    entry.examples.pictures = slow = Slow(entry.examples.pictures)
    galleries = Galleries([entry])
    galleries.start()
    assert slow.asked.wait(60)
    start = time.monotonic()
    galleries.close()
    assert time.monotonic() - start < 2  # all of them take 20 s
    assert galleries.gallery(entry.variants["trained"]) is None


def test_a_closed_explorer_ends_what_it_is_collecting(home, monkeypatch):
    entry = open_entries(None, home=home)[0]
    galleries, done = Galleries([entry], limit=32), galleries_module.collect_routing

    def close_first(*arguments, **options):
        galleries.stopping.set()
        return done(*arguments, **options)

    monkeypatch.setattr(galleries_module, "collect_routing", close_first)
    galleries.start()
    galleries.thread.join(60)
    assert galleries.atlas(entry.variants["trained"]) is None  # and no error


def stored_atlas(explorer, home, tmp_path, bundle, change):
    """A bundle with an atlas on disk, and what an explorer of it says about experts before and after its galleries."""
    from moevision.demo.atlas import save_atlas

    folder = bundle(tmp_path)
    atlas = json.loads(
        json.dumps(explorer.galleries.atlas(explorer.entries["pets"].variants["trained"]))
    )
    change(atlas)
    save_atlas(atlas, folder / "atlas.json")
    entries = open_entries(None, home=tmp_path)
    galleries = Galleries(entries, limit=32)
    before = galleries.atlas(entries[0].variants["trained"])
    galleries.start()
    galleries.thread.join(60)
    return atlas, before, galleries.atlas(entries[0].variants["trained"])


def test_a_stored_atlas_is_there_at_once_and_stays_unless_it_is_of_other_images(
    explorer, home, tmp_path, bundle
):
    def more(atlas):
        atlas["n_images"] = 2000

    def foreign(atlas):
        atlas["layers"][0]["experts"][0]["top"][0][0] = "test/999999"

    atlas, before, after = stored_atlas(explorer, home, tmp_path / "more", bundle, more)
    assert before == after == atlas
    _, before, after = stored_atlas(explorer, home, tmp_path / "foreign", bundle, foreign)
    assert before is None  # "computing", which the page waits for
    assert after["n_images"] == 32


def test_an_image_is_measured_once_however_often_it_is_routed(explorer, monkeypatch):
    """The distance takes a forward pass of its own, and every control of the page asks for the image again."""
    measured = []
    monkeypatch.setattr(
        service, "answers", lambda *given: measured.append(given) or answers(*given)
    )
    pixels = np.random.default_rng(5).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    told = [
        good(
            explorer,
            "route",
            model="pets",
            picture={"kind": "upload", "data": png(pixels)},
            top_k=top_k,
        )["picture"]
        for top_k in (1, 2, None)
    ]
    assert len(measured) == 1
    assert told[0]["unlike"] == told[1]["unlike"] == told[2]["unlike"]


@pytest.mark.whole
@pytest.mark.parametrize(
    ("recognized", "fragments"),
    [
        (0.93, ["This doesn't look", "may mean little"]),
        (0.8, ["This doesn't look", "may mean little"]),
        (0.61, ["This may be", "notices is 61 %"]),
        (None, ["This may be", "was not measured"]),
    ],
)
def test_a_stranger_is_told_in_words_that_follow_the_measured_share(
    explorer, recognized, fragments
):
    entry = explorer.entries["pets"]
    entry = replace(entry, card=replace(entry.card, recognized=recognized))
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    sentence = ood_message(entry, None, noise.tobytes())
    assert says(sentence, *fragments, "farther from every", "95 %")
    assert ood_message(entry, "cat", noise.tobytes()) is None  # a known class: nobody asks
    images, _ = usual_pets()
    told = [ood_message(entry, None, image.tobytes()) for image in images[80:]]
    assert (
        sum(each is not None for each in told) == 2
    )  # a twentieth of the 40 that set the threshold
    variants = {
        "trained": replace(
            entry.variants["trained"], saved=replace(saved(explorer), strangers=None)
        )
    }
    assert ood_message(replace(entry, variants=variants), None, noise.tobytes()) is None


def test_a_page_says_of_ones_own_image_that_it_is_strange(explorer):
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    for data, strange in ((noise, True), (usual_pets()[0][0], False)):
        answer = good(
            explorer, "route", model="pets", picture={"kind": "upload", "data": png(data)}
        )
        assert (answer["picture"]["unlike"] is not None) == strange


def test_examples_are_of_all_classes_of_a_large_folder():
    class Large:
        """A folder as it is read: one class after the other."""

        class_names, name, part_names = ("cat", "dog"), "large", ()

        def __len__(self):
            return 12_000

        def label(self, index):
            return index // 6000

        def picture_name(self, index):
            return f"{self.class_names[self.label(index)]}/{index}.png"

    shown = Examples(Large(), 32).all_ids[:12]
    assert [id.split("/")[1] for id in shown] == ["cat", "dog"] * 6


def test_pictures_in_memory_leave_out_what_can_not_be_read(drawn_pets, tmp_path):
    shutil.copytree(drawn_pets, tmp_path / "pets")
    broken = sorted((tmp_path / "pets" / "cat").iterdir())[0]
    broken.write_bytes(b"no picture")
    pictures = open_pictures(tmp_path / "pets", 32, split="all")
    held = read_into_memory(pictures, threading.Event())
    assert len(held) == len(pictures) - 1
    names = [held.picture_name(index) for index in range(len(held))]
    assert f"cat/{broken.name}" not in names
    place = names.index("dog/" + sorted(path.name for path in (drawn_pets / "dog").iterdir())[0])
    assert held.class_names[held.label(place)] == "dog"


def test_a_fault_of_ours_is_logged_and_told(explorer, monkeypatch, caplog):
    monkeypatch.setitem(explorer.handlers, "boot", lambda request: 1 / 0)
    answer = explorer.answer("boot", {})
    assert answer["code"] == "internal"
    assert "ZeroDivisionError" in caplog.text
