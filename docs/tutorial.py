# ruff: noqa: E501  (lines of Markdown)
"""Run the commands of docs/tutorial.md and write the page with what they print.

    python docs/tutorial.py PHOTOS --weights FILE [--work DIR]

PHOTOS has a folder for each class; those of the page are 2,880 of the Asirra cats and dogs. FILE is a ViT-S in timm's
names: `--pretrained auto` of the page becomes that file, so that nothing is downloaded. DIR keeps what each command
printed, and a command whose output is there isn't run again. Times depend on the machine; all else is reproducible on
one machine. The screenshot needs Chromium and `pip install ".[test]"`.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent
PAGE, IMAGES = DOCS / "tutorial.md", DOCS / "img"
EXAMPLES = DOCS.parent / "moevision" / "demo" / "models" / "photos" / "examples"
NEW = (
    "cat/chelsea.jpg",
    "cat/gcompris_kitten.jpg",
    "dog/darknet_dog.jpg",
    "dog/zoom_roxy.jpg",
)  # for `new/`
WEIGHTS = "vit_small_patch14_dinov2.safetensors"  # the name of FILE on the page
COLUMNS = 98

COMMANDS = {
    "folder": 'for class in photos/*; do echo "$class: $(ls "$class" | wc -l) photos"; done',
    "fit": "moevision fit photos --pretrained auto",
    "summary": "sed -n '3p;/^| top-1/p;/^| balanced/p;/^| class | recall/,/^$/p;/^| CPU time/p' runs/photos/summary.md",
    "wrong": "grep ',0$' runs/photos/predictions_test.csv | sort -t, -k4 -r | head -n 8",
    "predict": "moevision predict runs/photos new/ --format csv",
}
"""What the reader types, by step."""

TEMPLATE = """\
---
hide: [navigation]
---

# 3,000 photos, from folder to answer

You have photos sorted into folders and want a model that sorts the next ones. This page trains one on 2,880 photos of cats
and dogs, on one CPU thread without a GPU, and shows what every command prints. `python docs/tutorial.py` ran the commands
and wrote the page. Your times will differ.

## 1. Put one folder per class

{folder}

The top folder is the class; names and depth below it don't matter. You don't need to set photos aside for testing: the next
command does. Several photos of one animal or scene? Put them in one subfolder and add `--data.group_by parent` below, or
nearly the same photo is trained on and tested, and the accuracy is flattered.

## 2. Train

{fit}

From the top:

- **start**: the training starts from a pretrained model, which is why so few photos are enough. `auto` downloads one (88 MB);
  this page was made offline from a file, so your first line names another.
- **train, val, test**: the photos are split once. The model learns from the first part; the second is validated on
  after every epoch; the accuracy is reported on the third, which training never sees.
- **linear probe**: a simple classifier on the pretrained features, as a first estimate.
- **plan**: how long the training will take. Ctrl-C stops it at any time; the last line is then the command that continues.
- **Epoch 2/2**: the last of three, counted from 0.
- **The linear probe has …**: training brought 4 points, more than chance among 288 test photos: the interval doesn't hold 0.
  The dense model wasn't trained; it [often does as well](guides/when-experts.md). With `--with-twin` this line says which model
  to use ([the rule](guides/compare.md#two-runs)).

## 3. How good is it?

`runs/photos/summary.md` has everything with explanations. The main lines:

{summary}

`confusion.png` shows which class was taken for which, `curves.png` the training:

![Confusion matrix of the test photos](img/tutorial-confusion.png)

![Loss, accuracy, expert load and learning rate over the training](img/tutorial-curves.png)

## 4. Which photos did it get wrong?

`predictions_test.csv` lists every test photo: file, label, prediction, probability, and 1 if it was right. The mistakes, most
confident first:

{wrong}

Open them: some may be mislabelled.
`moevision data score
runs/photos` writes a page with the images most likely to be mislabelled, duplicated or unreadable, from *all* splits
([Good data](guides/good-data.md)).

## 5. Classify new photos

{predict}

A high probability is no guarantee: the kitten is called a dog with 94 %. `--unsure 0.9` answers `unsure` below 90 %, which would
not catch it. `distance` says how unlike the training photos an image is; above 1 it is called a stranger, here two of
four: a hint, no verdict. For JSON, ONNX or a web service see [Serve a model](guides/serve.md#only-the-predictions).

## 6. Look inside

```sh
moevision demo runs/photos
```

opens the explorer on the test photos; drop your own onto the page. Every patch flies to the expert that computes it; click a
box to see the answer without that expert. (The bars are the model's own probabilities; `predict`
calibrates them.)

![The explorer with the model of this page and one of the new photos](img/tutorial-explorer.jpg)

Do the colours mean anything? `moevision analyze runs/photos` ([more than chance?](guides/more-than-chance.md)).

## 7. If the accuracy is poor

| you see | do |
|---|---|
| mistakes that you would make too, or wrong labels | clean the folders; `moevision data score runs/photos` lists candidates |
| a training loss far below that of validation | more photos, or `--data.augment trivialaugment` |
| curves that still rise at the end | `--epochs 10` |
| small details decide | `--data.image_size 224`: about four times the time of 112 |
| rare classes are missed | `--data.balanced_sampling true` |
| nothing helps | the same model without experts (`--dense`), or one of the [alternatives](alternatives.md) |

`moevision fit photos --pretrained auto --with-twin` also trains the dense model and says which one to use. [Compare
runs](guides/compare.md) tells you whether a change helped.
"""


def block(command: str, printed: str) -> str:
    """A command and what it prints, in Markdown."""
    return f"```sh\n{command}\n```\n\n```text\n{printed}\n```"


def page(printed: Mapping[str, str]) -> str:
    """The page with what each step's command printed."""
    return TEMPLATE.format(
        **{step: block(command, printed[step]) for step, command in COMMANDS.items()}
    )


def tidy(text: str) -> str:
    """What a terminal shows at the end: no colours, no places of this machine, each progress bar once, lines wrapped."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.strip("\n").split("\n")]
    lines = [re.sub(r" *━[━╸╺ ]*", " ━━━━━━━━ ", line) for line in lines]
    kept: list[str] = []
    for line in lines:
        bar = line.split(" ━")[0]
        if kept and "━" in line and kept[-1].split(" ━")[0] == bar:
            kept.pop()
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(
        part for line in kept for part in (textwrap.wrap(line.strip(), COLUMNS) or [""])
    )


def run(step: str, work: Path, environment: Mapping[str, str]) -> str:
    """What a step's command prints, or printed when it was last run here."""
    known = work / f"{step}.txt"
    if not known.is_file():
        command = COMMANDS[step].replace("--pretrained auto", f"--pretrained {WEIGHTS}")
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        known.write_text(done.stdout, encoding="utf-8")
    return tidy(known.read_text(encoding="utf-8"))


def shoot(work: Path, environment: Mapping[str, str]) -> None:
    """The explorer on the run's model, as it opens, into the page's image."""
    from playwright.sync_api import sync_playwright

    words = [
        sys.executable,
        "-u",
        "-m",
        "moevision",
        "demo",
        "runs/photos",
        "--data",
        "shown",
        "--no-browser",
    ]
    server = subprocess.Popen(words, cwd=work, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = next(line for line in server.stdout if "The explorer is at" in line).split()[-1]
        with sync_playwright() as playwright:
            chromium = os.environ.get("MOEVISION_CHROMIUM", "/usr/bin/chromium")
            browser = playwright.chromium.launch(executable_path=chromium)
            tab = browser.new_page(viewport={"width": 1200, "height": 800})
            tab.goto(address)
            tab.wait_for_timeout(8000)  # the patches have landed
            # Photos of Gradio's stand beside a run's own; they aren't this page's to show.
            tab.evaluate(
                "document.querySelectorAll('[data-id^=\"photo/\"]').forEach((one) => one.remove())"
            )
            pixels = tab.screenshot(clip={"x": 0, "y": 0, "width": 1200, "height": 756})
            browser.close()
        image = Image.open(io.BytesIO(pixels)).convert("RGB")
        image.save(IMAGES / "tutorial-explorer.jpg", quality=88, optimize=True)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def main() -> None:
    """Run what wasn't run yet, and write page and images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/tutorial"))
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    for name, target in (("photos", arguments.photos), (WEIGHTS, arguments.weights)):
        if not (work / name).exists():
            (work / name).symlink_to(target.absolute())
    for name in NEW:  # `new/` is predicted; `shown/`, by class, is what the explorer opens on
        for target in (work / "new" / Path(name).name, work / "shown" / name):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(EXAMPLES / name, target)
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": str(COLUMNS), "OMP_NUM_THREADS": "1"}
    PAGE.write_text(
        page({step: run(step, work, environment) for step in COMMANDS}), encoding="utf-8"
    )
    for name, width in (("confusion", 440), ("curves", 1000)):
        image = Image.open(work / "runs" / "photos" / f"{name}.png").convert("RGB")
        size = (width, round(width * image.height / image.width))
        image.resize(size, Image.Resampling.LANCZOS).save(
            IMAGES / f"tutorial-{name}.png", optimize=True
        )
    shoot(work, environment)


if __name__ == "__main__":
    main()
