"""`data score`: planted damage and doubles are found, the page escapes everything, and its decisions become a list."""

import csv
import io
import os
import re
import shutil
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image, ImageFilter

import moevision.analysis.good_data
from moevision.analysis.good_data import (
    Nearest,
    Neighbours,
    RunImages,
    Thumbnails,
    _margins,
    caveats,
    class_lists,
    class_rows,
    examine,
    expert_lists,
    expert_rows,
    map_cells,
    page_content,
    render,
    score_run,
    table_lines,
)
from moevision.data.collection import FileCollection, Sample
from moevision.data.scores import SCORES, Scores, choose_kept_images
from moevision.data.synthetic import SyntheticPets
from moevision.errors import escape_csv_cell
from moevision.files import read_csv
from moevision.models.io import load_model

PETS = SyntheticPets(40, 48, 1, "train")
ABOUT = {"title": "Images", "command": "", "quick": False, "version": "1", "made": ""}
ABOUT |= {"explorer": "http://127.0.0.1:7860", "explorer_command": "moevision demo '<i>'"}


TEMPLATE = (
    Path(moevision.analysis.good_data.__file__).parent / "templates" / "good_data.html.jinja"
).read_text("utf-8")
KNOWN_TAGS = {*re.findall(r"<(\w+)", TEMPLATE), "data", "html", "head", "body", "style"}


def images_in(root: Path, classes: list[str], **splits: list[tuple[str, int]]) -> RunImages:
    samples = {
        split: [Sample(name, label) for name, label in members] for split, members in splits.items()
    }
    return RunImages(FileCollection(classes, samples, root=root), classes, samples)


def scores_of(images: RunImages, **values: list[float]) -> Scores:
    train = images.samples["train"]
    n = len(train)
    table = {name: np.array(values.get(name, np.linspace(0, 1, n)), np.float32) for name in SCORES}
    names = [escape_csv_cell(each.sample_id) for each in train]
    labels = [images.class_names[each.label] for each in train]
    experts = {1: np.array(np.random.default_rng(0).dirichlet([1, 1], n), np.float32)}
    return Scores(names, labels, np.full(n, 3), table, experts)


def draw(root: Path, name: str, index: int) -> Image.Image:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(PETS.image(index))
    image.save(root / name)
    return image


@pytest.fixture(scope="module")
def planted(tiny_run, tmp_path_factory):
    """16 drawn images for training and a recompressed copy of one for the test; blurred, dark, grey, odd, cut, gone."""
    root = tmp_path_factory.mktemp("planted")
    train = [(f"cat/{index:02d}.png", index % 2) for index in range(16)]
    for index, (name, _) in enumerate(train):
        draw(root, name, index)
    draw(root, "dog/blurred.png", 20).filter(ImageFilter.GaussianBlur(5)).save(
        root / "dog/blurred.png"
    )
    draw(root, "dog/dark.png", 21).point(lambda value: value // 12).save(root / "dog/dark.png")
    draw(root, "dog/grey.png", 22).convert("L").save(root / "dog/grey.png")
    draw(root, "dog/odd.png", 23).resize((12, 150)).save(root / "dog/odd.png")
    draw(root, "dog/cut.png", 24)
    (root / "dog/cut.png").write_bytes((root / "dog/cut.png").read_bytes()[:700])
    train += [(f"dog/{name}.png", 1) for name in ("blurred", "dark", "grey", "odd", "cut", "gone")]
    draw(root, "test/copy.jpg", 3).resize((40, 40)).save(root / "test/copy.jpg", quality=50)
    draw(root, "test/other.png", 30)
    test = [("test/copy.jpg", 1), ("test/other.png", 0)]
    images = images_in(root, ["cat", "dog"], train=train, test=test)
    return images, examine(images, scores_of(images), load_model(str(tiny_run)))


@pytest.fixture(scope="module")
def tiny_model(tiny_run):
    return load_model(str(tiny_run))


def listed(images: RunImages, known) -> dict[str, list[str]]:
    facts = page_content(images, known, 5)
    return {each["key"]: [entry["image"] for entry in each["entries"]] for each in facts["lists"]}


def test_planted_damage_leads_its_list(planted):
    images, known = planted
    found = listed(images, known)
    first = {key: found[key][0] for key in ("blurred", "dark", "odd")}
    assert first == {"blurred": "dog/blurred.png", "dark": "dog/dark.png", "odd": "dog/odd.png"}
    assert found["grey"] == ["dog/grey.png"]
    assert found["unreadable"] == ["dog/cut.png", "dog/gone.png"]
    assert found["leaks"][0] == "test/copy.jpg"
    assert set(found["doubles"][:1]) <= {"test/copy.jpg", "cat/03.png"}
    # EL2N rises with the row.
    assert found["easiest"] == [sample.sample_id for sample in images.samples["train"][:5]]
    assert found["hardest"][0] == found["unsteady"][0] == "dog/gone.png"


def test_the_table_has_every_image_with_what_is_known(planted):
    images, known = planted
    rows = list(csv.DictReader(io.StringIO("".join(table_lines(images, known)))))
    by_name = {row["image"]: row for row in rows}
    assert [(row["split"], row["image"]) for row in rows] == [
        (split, each.sample_id) for split, each in images
    ]
    copy, cut = by_name["test/copy.jpg"], by_name["dog/cut.png"]
    assert (copy["hash_twin"], copy["leak"], copy["width"]) == ("cat/03.png", "cat/03.png", "40")
    assert int(copy["hash_bits"]) <= 8
    assert copy["aum"] == copy["visits"] == copy["problem"] == ""
    assert (cut["width"], cut["prediction"], cut["visits"]) == ("", "", "3")
    assert "truncated" in cut["problem"]
    assert "no such file" in by_name["dog/gone.png"]["problem"]
    assert float(by_name["cat/03.png"]["el2n"]) == pytest.approx(3 / 21, abs=1e-4)
    assert {row["prediction"] for row in rows} <= {"cat", "dog", ""}


def test_the_numbers_of_a_leak_are_of_that_pair(planted):
    """By its hash the copy is like one image, by its features like another: the table names the first."""
    images, known = planted
    place = {sample.sample_id: index for index, sample in enumerate(images.all)}
    copy, origin = place["test/copy.jpg"], place["cat/03.png"]
    nearest = Nearest(known.by_features[1].other.copy(), known.by_features[1].distance.copy())
    nearest.other[copy], nearest.distance[copy] = place["cat/05.png"], 0.001
    known = replace(known, by_features=Neighbours(known.by_features.overall, nearest))
    table = "".join(table_lines(images, known))
    row = next(row for row in csv.DictReader(io.StringIO(table)) if row["image"] == "test/copy.jpg")
    assert (row["leak"], int(row["leak_bits"])) == ("cat/03.png", known.by_hash[1].distance[copy])
    cosine = float(known.white[copy] @ known.white[origin])
    assert float(row["leak_cosine"]) == pytest.approx(cosine, abs=1e-4)


def test_margins_of_the_finished_model_by_hand():
    p = np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.1, 0.5, 0.4]], np.float32)
    assert _margins(p, np.array([0, 1, 2])) == pytest.approx([0.5, -0.5, -0.1])
    assert _margins(np.ones((1, 1), np.float32), np.array([0])) == pytest.approx([1])


def test_tables_of_classes_and_experts_by_hand():
    """An image of a was computed by E0, one of b by both: E0 has 1.5 images' worth, of mean p (1 + .4 / 2) / 1.5."""
    images = images_in(Path(), ["a", "b"], train=[("1", 0), ("2", 1)])
    scores = scores_of(images, p_mean=[1, 0.4], aum=[2, -1], correct=[1, 0])
    scores.experts[1] = np.array([[1, 0], [0.5, 0.5]], np.float32)
    known = examine(images, scores, None)
    classes = [(row["name"], row["images"], row["aum"]) for row in class_rows(images, known)]
    assert classes == [("b", 1, -1.0), ("a", 1, 2.0)]
    first, second = expert_rows(images, known)
    assert (first["name"], first["images"], first["class"]) == ("L1.E0", 1.5, "a")
    assert (first["share"], first["p_mean"], first["of_class"]) == pytest.approx(
        (0.75, 1.2 / 1.5, 1 / 1.5)
    )
    assert (second["class"], second["p_mean"]) == ("b", pytest.approx(0.4))
    groups = expert_lists(known)  # E1 has 0.25 of the layer, half of an even share
    assert [group.title[:11] for group in groups] == ["L1.E1: 0.50", "L1.E0: 1.50"]
    assert [group.rows.tolist() for group in groups] == [[1], [0, 1]]
    assert groups[1].values[1] == "50% of the image"
    groups = class_lists(images, known)
    assert [(group.title, group.rows.tolist()) for group in groups] == [("b", [1]), ("a", [0])]
    scores.experts[1] = np.array([[1, 0], [0.9, 0.1]], np.float32)
    few, _ = expert_lists(examine(images, scores, None))
    assert few.title.startswith("L1.E1: 0.10 ")
    assert few.title.endswith(", little work")
    p = np.array([0.0, 0.999, 1.0, np.nan], np.float32)
    spread = np.array([0, 0.5, 0.26, 0], np.float32)
    cells = map_cells(p, spread, np.array([0, 0, 1, 1]))
    assert cells == [[0, 0, 0, 1], [0, 23, 15, 1], [1, 23, 8, 1]]


def test_a_weak_model_and_few_looks_are_said_above_the_lists(planted):
    """16 of 24 right is enough, 2 looks are not; 12 of 24 right is not."""
    images, known = planted
    labels = images.labels
    wrong = lambda count: np.where(np.arange(len(labels)) < count, 1 - labels, labels)  # noqa: E731
    assert len(labels) == 24
    assert caveats(replace(known, prediction=wrong(8)), labels) == []
    few = replace(known, prediction=wrong(8), visits=np.full_like(known.visits, 2))
    (looks,) = caveats(few, labels)
    assert "2 times" in looks
    assert "3 or more" in looks
    (weak,) = caveats(replace(known, prediction=wrong(12)), labels)
    assert "right on 50 %" in weak
    facts = page_content(images, replace(known, prediction=wrong(12)), 5) | ABOUT
    assert 'class="note weak"' in render(facts, lambda _: {"src": None, "problem": "gone"})


def test_images_that_were_never_visited_do_not_hide_that_a_model_is_weak(planted):
    """Without predictions the accuracy is that of the visits; by hand: 8 of 16 with a record."""
    images, known = planted
    correct = np.zeros(len(known.visits), np.float32)
    correct[:8] = 1
    correct[16:] = np.nan
    unpredicted = np.full_like(known.prediction, -1)
    facts = replace(known, prediction=unpredicted, scores=known.scores | {"correct": correct})
    (weak,) = caveats(facts, images.labels)
    assert "right on 50 %" in weak


def test_of_few_visits_the_finished_model_s_list_comes_first(planted):
    """Ten are not few."""
    images, known = planted
    for visits, first in ((9, "contradicted"), (10, "doubtful")):
        facts = replace(known, visits=np.full_like(known.visits, visits))
        assert next(iter(listed(images, facts))) == first


def test_one_image_and_none_with_a_score(tmp_path):
    draw(tmp_path, "a/1.png", 0)
    images = images_in(tmp_path, ["a"], train=[("a/1.png", 0)])
    scores = scores_of(images)
    for visits in (3, 0):
        scores.visits[0] = visits
        if not visits:
            for name in SCORES:
                scores.scores[name][0] = np.nan
        facts = page_content(images, examine(images, scores, None), 5)
        assert [each["key"] for each in facts["lists"]] == (
            ["doubtful", "hardest", "unsteady", "easiest"] if visits else []
        )
        assert "<h2" in render(facts | ABOUT, Thumbnails(images, tmp_path / "thumbs"))


# ---- names of an attacker


class Elements(HTMLParser):
    """Every start tag, and every attribute of a handler."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


CLASSES = ["=1+1<b>x", "\x1b[31m\"dog' & </script>", "plain"]
NAMES = [
    "<img src=x onerror=alert(1)>.png",
    '"><script>alert(2)</script>.png',
    "=cmd|' !A0.png",
    "{{7*7}}\u202egpj.png",
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    train = [(f"{index}{name}", index % 3) for index, name in enumerate(NAMES * 2)]
    for index, (name, _) in enumerate(train):
        draw(root, name, index)
    images = images_in(root, CLASSES, train=train, test=[("<i>gone", 0)])
    scores = scores_of(images)
    facts = (
        page_content(images, examine(images, scores, None), 8)
        | ABOUT
        | {"title": "<u>run" + 200 * "x"}
    )
    home = tmp_path_factory.mktemp("hostile_page")
    page = render(facts, Thumbnails(images, home / "thumbs"))
    (home / "page.html").write_text(page)
    return images, scores, page, home


def test_no_name_becomes_an_element(hostile):
    images, scores, page, _ = hostile
    found = Elements(page)
    assert (found.tags["script"], found.handlers) == (2, [])
    assert {"b", "i", "u"} & found.tags.keys() == set()
    pairs = page_content(images, examine(images, scores, None), 8)["lists"][-1]["entries"]
    # Every list of images shows every training image, classes show all of theirs, each of two experts five.
    assert found.tags["img"] == 5 * 8 + 2 * len(pairs) + 8 + 2 * 5
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "{{7*7}}" in page
    assert images.samples["test"][0].sample_id not in page


@pytest.mark.browser
@pytest.mark.needs("chromium", "playwright")
def test_decisions_by_keyboard_are_saved_undone_and_become_a_list(hostile, tmp_path):
    from playwright.sync_api import sync_playwright

    from tests.needs import chromium

    images, scores, _, home = hostile
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(accept_downloads=True)
        tab.on(
            "request",
            lambda asked: asked.url.startswith(home.as_uri()) or complaints.append(asked.url),
        )
        for event in ("console", "pageerror", "dialog"):
            tab.on(event, lambda found, event=event: complaints.append(f"{event} {found}"))
        tab.goto((home / "page.html").as_uri())
        assert tab.locator("#map rect.cell").count() > 0
        assert tab.evaluate(
            "document.documentElement.scrollWidth <= innerWidth"
        )  # however long the run's name
        cards = tab.locator("#doubtful .card")
        cards.first.focus()
        for key in (
            "d",
            "ArrowRight",
            "w",
            "Home",
            "Enter",
            "ArrowRight",
            "k",
            "d",
            "u",
        ):  # u: back to keep
            tab.keyboard.press(key)
        assert tab.locator("#count").inner_text() == "3 decisions"
        decisions = [cards.nth(place).get_attribute("data-decision") for place in range(4)]
        assert decisions == ["drop", "relabel", "keep", ""]
        badge = cards.nth(1).locator(".badge").inner_text()
        assert badge == f"label: {escape_csv_cell(CLASSES[0])}"
        # The same image in another list.
        assert tab.locator("#easiest .card[data-decision=drop]").count() == 1
        tab.context.route(
            "http://127.0.0.1:7860/**", lambda route: route.fulfill(body="the explorer")
        )
        cards.nth(1).focus()
        with tab.expect_popup() as explorer:
            tab.keyboard.press("e")
        picture = f"train/{cards.nth(1).get_attribute('data-id')}"
        asked = parse_qs(urlsplit(explorer.value.url).query)
        assert asked == {"picture": [picture]}
        with tab.expect_download() as download:
            tab.locator("#save").click()
        download.value.save_as(tmp_path / "decisions.csv")
        again = browser.new_page()
        again.goto((home / "page.html").as_uri())
        again.locator("#load").set_input_files(home / "page.html")
        again.locator(
            "#load-said", has_text="page.html can't be read: it does not begin with image,label"
        ).wait_for()
        again.locator("#load").set_input_files(tmp_path / "decisions.csv")
        again.locator("#count", has_text="3 decisions").wait_for()
        assert again.locator("#doubtful .card[data-decision=drop]").count() == 1
        browser.close()
    others = [text for text in complaints if not text.startswith("request") or "blob:" not in text]
    assert others[1:] == []  # the first is the page
    plan = choose_kept_images(scores, tmp_path / "decisions.csv")
    assert plan.keep.tolist() == [False] + [True] * 7
    assert plan.new_label == {1: escape_csv_cell(CLASSES[0])}
    assert plan.reason[:4] == [
        "decided: drop",
        "decided: wrong label",
        "decided: keep",
        "not decided",
    ]
    assert len(images.samples["train"]) == 8


# ---- hostile folders

PAIRS = [
    ("<img src=x onerror=alert(1)>", '"><script>alert(1)</script>'),
    ("</script><svg onload=alert(1)>", "' onfocus='a"),
    ("<!-- ", "]]>"),
    ("&lt;b&gt;&#60;", "{{7*7}}{% raw %}"),
    ("${7*7}", "javascript:alert(1)"),
    ("#a?b=c&d", "100%20%"),
    ("line\nbreak", "carriage\rreturn"),
    ("tab\t", "\x1b[2J"),
    ("\u202egpj", "\u200b"),
    ("\u2028", "\ufeff"),
    ("\udcff", "🐈\u200d⬛ 👩\u200d👧"),
    ("e\u0301", "漢字 عربى"),
    ("-rf", "--help"),
    ("=1+1", "+1"),
    ("@SUM(1)", "＝1"),
    ("'=1", '"a","b"'),
    ("a,b;c", "back\\slash"),
    (" space ", "..."),
    ("x" * 200, "__proto__"),
    ("NaN", "b"),
]


def named(one: str, two: str):
    """Two classes and their images with such names; one file is missing."""

    def build(root: Path):
        train = [(f"{one}/{one}1.png", 0), (f"{one}/{one}2.png", 0), (f"{two}/{two}3.png", 1)]
        for index, (each, _) in enumerate(train):
            draw(root, each, index)
        return [one, two], train, [(f"{two}/{two}gone.png", 1)], 1

    return build


def of_files(bad: int, **writers):
    """Three good images of two classes, and files that are written in such a way; `bad` of them can't be read."""

    def build(root: Path):
        for index in range(3):
            draw(root, f"a/{index}.png", index)
        for name, write in writers.items():
            write(root / f"a/{name}.png")
        train = [(f"a/{name}.png", index % 2) for index, name in enumerate([0, 1, 2, *writers])]
        return ["a", "b"], train, [], bad

    return build


def of_size(width: int, height: int, mode: str = "RGB", kind: str = "PNG"):
    return lambda path: Image.new(mode, (width, height), 1).save(path, kind)


def one_class_and_an_empty_one(count: int):
    def build(root: Path):
        for index in range(count):
            draw(root, f"a/{index}.png", index)
        return ["a", "nobody"], [(f"a/{index}.png", 0) for index in range(count)], [], 0

    return build


def all_gone(root: Path):
    return ["a", "b"], [("a/1.png", 0), ("b/2.png", 1)], [("a/3.png", 0)], 3


def huge(path: Path):
    """A header that promises 400,000 x 400,000 pixels."""
    of_size(8, 8)(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (400_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


FOLDERS = {f"named {pair[0]!r}"[:40]: named(*pair) for pair in PAIRS} | {
    "one image": one_class_and_an_empty_one(1),
    "one class, and an empty one": one_class_and_an_empty_one(3),
    "all gone": all_gone,
    "damaged": of_files(
        6, empty=Path.touch, text=lambda path: path.write_text("<svg onload=alert(1)>"), huge=huge,
        cut=lambda path: (of_size(64, 64)(path), path.write_bytes(path.read_bytes()[:60])),
        folder=Path.mkdir, header=lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    ),
    "links": of_files(
        3, broken=lambda path: path.symlink_to("nothing"), round=lambda path: path.symlink_to(path.name),
        folder=lambda path: path.symlink_to(".."), good=lambda path: path.symlink_to("0.png"),
    ),
    "no regular file": of_files(1, pipe=os.mkfifo),
    "no such name": of_files(2, **{"y" * 300: lambda path: None, "nul\0": lambda path: None}),
    "tiny and thin": of_files(0, one=of_size(1, 1), wide=of_size(3000, 1), high=of_size(1, 3000), two=of_size(2, 2)),
    "black copies": of_files(0, **{f"black{index}": of_size(32, 32) for index in range(3)}),
    "odd kinds": of_files(
        0, grey=of_size(9, 9, "I;16"), palette=of_size(9, 9, "P"), clear=of_size(9, 9, "RGBA"),
        cmyk=of_size(9, 9, "CMYK", "JPEG"), bit=of_size(9, 9, "1"), gif=of_size(9, 9, "P", "GIF"),
    ),
    "never visited": of_files(0),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder(name, tiny_model, tmp_path):
    """The page is written, has no element of a name, and says of each file that can't be read why."""
    classes, train, test, bad = FOLDERS[name](tmp_path)
    images = images_in(tmp_path, classes, train=train, **({"test": test} if test else {}))
    scores = scores_of(images)
    if name == "never visited":
        scores.visits[:] = 0
        for values in (*scores.scores.values(), *scores.experts.values()):
            values[:] = np.nan
    known = examine(images, scores, tiny_model)
    facts = page_content(images, known, 8)
    page = render(facts | ABOUT | {"title": name}, Thumbnails(images, tmp_path / "thumbs"))
    found = Elements(page)
    assert (found.tags["script"], found.handlers) == (2, [])
    assert found.tags.keys() <= KNOWN_TAGS
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200b\u2028\u202e\ufeff]", page)
    page.encode()  # no lone surrogate
    entries = [len(each["entries"]) for each in facts["lists"] if each["key"] == "unreadable"]
    assert (len(known.problems), sum(entries)) == (bad, bad)
    assert all(known.problems.values())
    text = "".join(table_lines(images, known))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert sum(row["problem"] != "" for row in rows) == bad
    assert len(rows) == len(images)
    cells = [row[key] for row in rows for key in ("image", "label", "problem")]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    decided = [(row["image"], row["label"], "keep", "") for row in rows if row["split"] == "train"]
    with (tmp_path / "decisions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "decision", "new_label"), *decided])
    assert choose_kept_images(scores, tmp_path / "decisions.csv").keep.all()


# ---- of a run


def test_the_page_of_a_run(cli, tiny_run, tmp_path):
    outcome = cli("data", "score", tiny_run, "--out", tmp_path / "found")
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"\d+ train, \d+ val, \d+ test images, 1 of them", outcome.out)
    rows = read_csv(tmp_path / "found/images.csv")
    for split, file, column in (
        ("test", "predictions_test.csv", "prediction"),
        ("train", "scores.csv", "aum"),
    ):
        wanted = {row["image"]: row[column] for row in read_csv(tiny_run / file)}
        assert {row["image"]: row[column] for row in rows if row["split"] == split} == wanted
    page = (tmp_path / "found/page.html").read_text()
    assert 'id="doubtful"' in page
    assert 'id="leaks"' in page
    assert "moevision data score" in page
    sources = re.findall(r'<img src="([^"]+)"', page)
    assert len(page) < 1_000_000  # images come as one scrolls
    assert sources
    assert {(tmp_path / "found" / source).is_file() for source in sources} == {True}
    quick = score_run(tiny_run, tmp_path / "quick", quick=True, show=3)
    keys = ["doubtful", "hardest", "unsteady", "experts", "easiest", "redundant"]
    assert [each["key"] for each in quick["lists"]] == keys
    assert all(len(each["entries"]) == 3 for each in quick["lists"])
    moved = Path(shutil.copytree(tiny_run, tmp_path / "moved"))
    (moved / "scores.csv").write_text("image\n")
    outcome = cli("data", "score", moved)
    assert outcome.code == 2
    assert "table of scores" in outcome.err


def _no_data(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(?m)^  path: .*$", "  path: /nowhere/pets", text))


def _half(run: Path) -> None:
    lines = (run / "scores.csv").read_text().splitlines(keepends=True)
    (run / "scores.csv").write_text("".join(lines[:9]))


def _hostile_split(run: Path) -> None:
    with (run / "splits.csv").open("a") as file:
        file.write('train,"dog/<b>\\n=gone.png",dog\n')


@pytest.mark.parametrize(
    ("harm", "options", "words"),
    [
        (_no_data, [], "/nowhere/pets"),
        (_no_data, ["--quick"], "/nowhere/pets"),
        (lambda run: shutil.rmtree(run / "model"), [], "model"),
        (lambda run: shutil.rmtree(run / "model"), ["--quick"], None),
        (lambda run: (run / "splits.csv").unlink(), ["--quick"], None),
        (_half, ["--quick"], None),
        (lambda run: (run / "scores.csv").unlink(), [], "scores.csv can't be read"),
        (lambda run: (run / "scores.csv").write_bytes(b"\xff\xfe\x00"), [], "scores"),
        (lambda run: (run / "config.yaml").write_text("- 1\n"), [], "config.yaml can't be read"),
        (_hostile_split, ["--quick"], "splits.csv"),
    ],
)
def test_a_harmed_run(cli, tiny_run, tmp_path, harm, options, words):
    """What is missing is said in a line, or the page does without it."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "twin"))
    harm(run)
    outcome = cli("data", "score", run, *options)
    assert outcome.code == (2 if words else 0), outcome.err
    assert (words or "") in outcome.err
    assert (run / "data/page.html").exists() == (words is None)
    assert len(outcome.err.splitlines()) <= 1
