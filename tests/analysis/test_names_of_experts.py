"""What experts are named after: the part that more than half of their patches show, beside clusters of their input."""

from typing import Any

import numpy as np
import pytest

from moevision.analysis.describe import (
    ExpertName,
    LayerNames,
    describe_names,
    name_experts,
    names_in_layers,
)
from moevision.analysis.images import open_pictures
from moevision.data import EmojiPages
from moevision.data.emoji import GROUPS
from moevision.models.io import load_model
from tests.shared import says, succeeded

EMOJI = (
    *("--data.path=emoji", "--data.train_size=64", "--data.val_size=16", "--data.test_size=18"),
    *("--data.batch_size=32", "--model.arch.name=vit_moe_micro_patch4_32"),
    *("--model.arch.patch_size=16", "--model.arch.embed_dim=32", "--model.arch.depth=2"),
    *("--model.arch.moe_layers=all", "--model.arch.num_heads=2"),
    *("--model.arch.num_experts=4", "--model.arch.top_k=1"),
    *("--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--name=pages"),
)


def test_an_expert_is_named_above_half():
    """Expert 0 has 3 of 5 patches of part 1, expert 1 two of four, expert 2 none."""
    choices = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 1]])
    parts = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 1]])
    names = name_experts(choices, parts, 3, ["face", "ear"])
    assert names == [
        ExpertName("ear", 3 / 5, 5),
        ExpertName("face", 2 / 4, 4),
        ExpertName("face", 0.0, 0),
    ]
    assert [name.is_named for name in names] == [True, False, False]


def test_a_name_stands_beside_the_purest_cluster_of_that_name():
    experts = [
        ExpertName("ear", 0.6, 50),
        ExpertName("face", 0.75, 8),
        ExpertName("ear", 0.4, 9),
        ExpertName("face", 0.0, 0),
    ]
    clusters = [ExpertName("ear", 0.3, 9), ExpertName("ear", 0.55, 9)]
    one = LayerNames("L0", experts, clusters)
    assert describe_names([one], "emoji") == [
        "  expert 0   ear, 60 % of its emoji (clusters: 55 %)",
        "  expert 1   face, 75 % of its emoji (clusters: none)",
        "  expert 2   mixed: ear 40 %",
        "  expert 3   takes nothing",
    ]
    assert describe_names([one, one], "emoji")[0] == "layer L0"
    without = one._replace(clusters=[])
    assert describe_names([without], "patches")[0] == "  expert 0   ear, 60 % of its patches"


@pytest.fixture(scope="module")
def pages_run(tmp_path_factory: pytest.TempPathFactory, cli: Any) -> tuple[Any, Any]:
    """A training of two steps on pages of emoji: what it printed, and its folder."""
    root = tmp_path_factory.mktemp("pages")
    outcome = succeeded(cli("fit", *EMOJI, "--runs_root", root))
    return outcome, root / "pages"


@pytest.mark.deep
def test_fit_says_what_the_experts_of_drawn_images_take(pages_run):
    outcome, run = pages_run
    text = outcome.out.split("What each expert takes")[1]
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("layer ")] == ["layer L0", "layer L1"]
    assert sum(line.startswith("  expert ") for line in lines) == 2 * 4
    assert says(text, "pages right whose emoji it was never trained on")
    assert f"What each expert takes{text}".strip() in (run / "summary.md").read_text()


@pytest.mark.deep
def test_names_are_counted_on_the_pages(pages_run):
    """A patch is a cell: the table counted here from routes and groups has the same purest group."""
    from moevision.analysis.collect import collect_routing

    _, run = pages_run
    model = load_model(str(run))
    pages = EmojiPages(40, split="test")
    pictures = open_pictures(pages, model.image_size)
    trace = collect_routing(model, pictures, progress=False)
    layers = names_in_layers(model, pictures)
    for number, layer in enumerate(layers):
        first = trace.layers[number].expert_index[:, :, 0]
        table = np.zeros((4, len(GROUPS)))
        for page in range(40):
            for cell, group in enumerate(_groups(pages, page)):
                table[first[page, cell], group] += 1
        share = table.max(1) / np.maximum(table.sum(1), 1)
        assert [name.share for name in layer.experts] == pytest.approx(share)
        assert [name.num_patches for name in layer.experts] == table.sum(1).tolist()


def _groups(pages: EmojiPages, page: int) -> list[int]:
    return pages.part_mask(page)[8::16, 8::16].ravel().tolist()


@pytest.mark.deep
def test_images_without_parts_have_no_names(pages_run, drawn_pets):
    model = load_model(str(pages_run[1]))
    pictures = open_pictures(drawn_pets, model.image_size, split="all")
    assert names_in_layers(model, pictures) == []
