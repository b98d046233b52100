"""Pages of docs/ that quote a number or two; those with more have a module of their own."""

import re

from benchmarks.records import (
    ROOT,
    Claim,
    Definition,
    accuracy,
    analysis,
    demo,
    quickstart,
    routers,
    studies,
)

CLAIMS = {
    "benchmarks/sparsity/README.md": [
        Claim(
            (),
            "{cifar10:.0%} (CIFAR-10), {imagenette:.0%} (Imagenette), {cats_vs_dogs:.0%} (cats and dogs) and "
            "{quickstart:.0%} (quickstart)",
            studies.shares,
        )
    ],
    "configs/cats_vs_dogs.yaml": [Claim(tuple(accuracy.CATS), accuracy.HEAD, accuracy.of_runs)],
    "configs/imagenette.yaml": [
        Claim(record, accuracy.HEAD, accuracy.of_runs)
        for record in (accuracy.IMAGENETTE, accuracy.IMAGENETTE_FOLDER)
    ],
    "configs/cifar10.yaml": [Claim(tuple(accuracy.CIFAR), accuracy.HEAD, accuracy.of_runs)],
    "configs/quickstart.yaml": [
        Claim(
            quickstart.NOW,
            "{tests} % of {total:,} test images, {seconds} CPU seconds",
            quickstart.of_command,
        ),
        Claim(quickstart.QUICKSTART, "{slowest} times the mean load", quickstart.loads),
    ],
    "docs/guides/own-images.md": [
        Claim(
            (*accuracy.FOLDERS, accuracy.BOTH),
            "took {fastest:.0f} to {slowest:.0f} minutes on one CPU thread and reached {least:.1f} to {most:.1%} (four",
            accuracy.of_folders,
        ),
        Claim(
            accuracy.NONE,
            "{mean:.1%} on the same photos after {slowest:.0f} minutes (one seed)",
            accuracy.of_folders,
        ),
    ],
    "docs/index.md": [demo.OPENING],
    "docs/guides/more-than-chance.md": [
        Claim(
            analysis.ATLAS,
            "different experts, yes ({bits} bits of 3, first choices). That training the router added to it is "
            "{training}: clusters of the layer's input tell {clusters} bits. The experts do different things, yes: "
            "exchanging a class's favourite expert with any other costs {points} points of accuracy ({interval}); "
            "at equally many moved choices {favourite}, any two other experts {others}; on the same patches it costs "
            "{beyond} of log-loss more than their other choice",
            analysis.answers,
        ),
        Claim(analysis.ATLAS, "in block 2 ({bits} bits, {n_images:,} images", analysis.answers),
    ],
    "docs/guides/serve.md": [
        Claim(
            demo.LIVE,
            "On {images} images all classes and first choices equal Python's",
            demo.of_all,
        ),
        Claim(demo.LOAD, "{visitors} simulated visitors got {answers_per_s:.1f} answers a second"),
        Claim(
            demo.LOAD,
            "a new image after {s:.1f} s (median)",
            lambda record: {"s": record["latency"]["new picture"]["p50_ms"] / 1e3},
        ),
    ],
    "docs/reference/routers.md": [
        Claim(
            routers.STUDY,
            "it was {mean:.1f} points above the dense twin ({low:+.1f} to {high:+.1f})",
            routers.learned,
        )
    ],
    "docs/reference/models.md": [
        Claim(
            quickstart.CATS_CARD,
            "a pretrained ViT-S | {total:,} | {moe} | {dense} |",
            quickstart.of_card,
        ),
        Claim(
            quickstart.TWO_CARD,
            "two experts, told the class | {total:,} | {moe} | {dense} |",
            quickstart.of_card,
        ),
        Claim(
            quickstart.CIFAR_CARD,
            "from scratch | {total:,} | {moe} | {dense} |",
            quickstart.of_card,
        ),
        Claim(quickstart.CARD, "eight classes | {total:,} | {moe} | {dense} |", quickstart.of_card),
    ],
}
_MODELS = re.findall(
    r"^\| `vit_moe_.*\|$", (ROOT / "docs" / "reference" / "models.md").read_text(), re.M
)
_APACHE = ("few-shot and zero-shot", "a free course and book")
DEFINITIONS = {
    "configs/cats_vs_dogs.yaml": [
        Definition("25.1 M parameters, 18.0 M active", "a size, as `moevision info` counts it"),
        Definition("2,048 to learn from and 832 to test", "the data"),
    ],
    "configs/cats_vs_dogs_two.yaml": [
        Definition("20.4 M parameters, 18.0 M active", "a size, as `moevision info` counts it")
    ],
    "configs/imagenette.yaml": [Definition("a ViT-S at 112 px, three epochs", "what `fit` chose")],
    "configs/moe_vie.yaml": [
        Definition("4 of 32", "a setting"),
        Definition("a hundred times larger", "by the paper"),
    ],
    "docs/alternatives.md": [
        Definition("| AGPL-3.0, or a paid enterprise licence", "a licence"),
        Definition("| AGPL-3.0, a commercial or", "a licence"),
        Definition("(AGPL-3.0), which also classifies", "a licence"),
        Definition("ES-MoE](https://pypi.org/project/esmoe/) (AGPL-3.0)", "a licence"),
        *(Definition(f"{name} | Apache-2.0", "a licence") for name in _APACHE),
        Definition("| Apache-2.0 (weights vary)", "a licence"),
    ],
    "docs/concepts/balance.md": [Definition("(V-MoE, §4.1)", "a section of the cited paper")],
    "docs/concepts/five-looks.md": [
        Definition("12 × 12 patches", "a size"),
        Definition(
            'rootMargin: "-65% 0px -30% 0px"', "where on the screen a section counts as read"
        ),
    ],
    "docs/concepts/evidence.md": [
        Definition("95 %, over other images", "the level of the intervals")
    ],
    "docs/concepts/walk.md": [
        Definition(
            "for 0.7 and another for 0.3 gets 0.7 of the one output and 0.3 of", "an example"
        )
    ],
    "docs/faq.md": [
        Definition(
            "5.0 over five MoE layers is perfect, 5.0 in one layer", "the loss by its formula"
        ),
        Definition("weights (88 MB on a CPU)", "the size of the download that is named"),
    ],
    "docs/guides/serve.md": [
        Definition("lesson of 45 minutes", "a plan"),
        Definition("with nginx 1.26 and two processes", "a version, and how it was tested"),
        Definition("tested with 0.2.19", "a version"),
    ],
    "docs/guides/several-gpus.md": [
        Definition("Five minutes before its time ends the job", "--signal=USR1@300")
    ],
    "docs/guides/compare.md": [
        Definition("with its 95 % interval", "the level of the intervals"),
        Definition("(p ≥ .05; of balanced accuracies", "the level of the tests"),
        Definition("would detect with 80 % power", "POWER of `moevision.stats`"),
        Definition(
            "12.7 standard errors wide on either side, that of five seeds 2.8",
            "quantiles of Student's t",
        ),
    ],
    "docs/guides/tables-and-logs.md": [
        Definition("where no class reaches 60 %", "the example's `--unsure 0.6`"),
        Definition(
            "more than 1.5 times the training images", "a constant of `moevision.train.report`"
        ),
        Definition("Lightning 2.6.6", "a version"),
        Definition("| `tensorboard` 2.21 |", "a version"),
        Definition("| `wandb` 0.31 |", "a version"),
        Definition("| `mlflow` 3.17 |", "a version"),
        Definition("MLflow 3.17", "a version"),
        Definition("trackio 0.43", "a version"),
    ],
    "docs/guides/keep-alive.md": [
        Definition("32 with a moving average (2.1 GB for 86 M parameters", "24 bytes × 86 M"),
        Definition("every ten minutes", "a default of `CheckpointConfig`"),
    ],
    "docs/guides/more-than-chance.md": [
        Definition("3 bits would determine one of 8 classes", "log2 8"),
        Definition("95 %, over other images", "the level of the intervals"),
    ],
    "docs/guides/own-images.md": [
        Definition("2,048 photos of cats and dogs", "the data"),
        Definition("Above 5 % of a split", "the default of `data.max_bad_fraction`"),
        Definition("a DINOv2 ViT-S (88 MB) on a CPU", "the size of the download that is named"),
        Definition(
            "over an hour, a ViT-B on a GPU of 12 GB", "constants of `moevision/train/start.py`"
        ),
        Definition(
            "112 px on a CPU and 224 px on a GPU, layer decay 0.75",
            "what `moevision/train/start.py` chooses",
        ),
    ],
    "docs/index.md": [
        Definition("Python 3.11 or newer", "a version"),
        Definition("A lesson of 45 minutes", "a plan"),
    ],
    "docs/tutorial.md": [
        Definition("downloads one (88 MB)", "the size of the download that is named"),
        Definition("training brought 3 points, which", "the output above"),
        Definition(
            "a dog with 98 %. `--unsure 0.9` answers `unsure` below 90 %",
            "the output above, 0.9758",
        ),
        Definition("about four times the time of 112", "224² over 112²"),
    ],
    "docs/reference/files.md": [
        Definition(
            "from 5 on the features must agree, cosine at least .7",
            "SURE_BITS, AGREE of `analysis.good_data`",
        ),
        Definition("in the fewest of 64 bits", "the length of the hash"),
        Definition(
            "with 1 where 5 % of the validation images lie beyond",
            "`moevision.models.ood.REFUSED`",
        ),
    ],
    "docs/reference/config.md": [
        Definition("(Docker gives 64 MB)", "Docker's default"),
        Definition(
            "as many as cost about 1 % of the training", "a constant of `moevision.train.health`"
        ),
        Definition("more than 1.5 times the training", "a constant of `moevision.train.report`"),
        Definition("input times U(0.99, 1.01)", "how jitter is defined"),
        Definition("such as 0.75", "an example"),
        Definition(
            "tens of seconds at the start", "an order of magnitude that the option's own help names"
        ),
        Definition("such as 0.999", "an example"),
    ],
    "docs/reference/models.md": [
        *(Definition(row, "counted again by `tests/docs/test_docs.py`") for row in _MODELS),
        Definition("are Wilson's 95 % over", "the level of the intervals"),
    ],
    "docs/reference/routers.md": [
        Definition("importance 0.05, load 0.05", "defaults of `moevision/layers/routers.py`"),
        Definition("load balancing 0.05", "default of `moevision/layers/routers.py`"),
    ],
}
