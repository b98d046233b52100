"""The figures say what the arrays say: numbers, colours and marks are read back from what was drawn."""

import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from PIL import Image

from moevision.analysis import plots
from moevision.analysis.plots import BLANK, EXPERT_COLOURS, NEUTRAL, wrap_text
from moevision.analysis.trace import RoutingTrace
from tests.analysis.conftest import trace_of
from tests.analysis.pictures import MadePictures


def make_trace(
    images: int = 3,
    grid: tuple[int, int] = (4, 4),
    experts: int = 8,
    top_k: int = 2,
    layers: int = 2,
    seed: int = 0,
) -> RoutingTrace:
    """Random routing by a softmax; weights are the probabilities of the chosen experts."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(experts, 0.5), (layers, images, grid[0] * grid[1]))
    chosen = np.argsort(-probs, -1)[..., :top_k]
    names = ("cat", "dog", "a class with quite a long name")
    labels = np.arange(images) % 3
    trace = trace_of(*chosen, labels=labels, num_experts=experts, grid=grid, class_names=names)
    weights = np.take_along_axis(probs, chosen, -1).astype(np.float32)
    weighted = [
        replace(layer, combine_weight=weight)
        for layer, weight in zip(trace.layers, weights, strict=True)
    ]
    return replace(trace, layers=tuple(weighted))


def numbered(index: int) -> np.ndarray:
    """Every pixel carries its image's number, so that a crop tells where it is from."""
    return np.full((32, 32, 3), 10 * (index + 1), dtype=np.uint8)


PICTURES = MadePictures(3, numbered, ("cat", "dog", "owl"))
PICTURE = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def words(where: Figure | Axes) -> list[str]:
    return [
        text.get_text() for text in where.findobj(Text) if text.get_text() and text.get_visible()
    ]


def heading_of(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def ticks_out_of_view(axis: Axis) -> set[Text]:
    """Labels that matplotlib keeps for ticks beyond the axis' ends, and doesn't draw."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-6 * (high - low)
    ticks = [
        tick for tick in axis.get_major_ticks() if not low - slack <= tick.get_loc() <= high + slack
    ]
    return {label for tick in ticks for label in (tick.label1, tick.label2)}


def assert_readable(figure: Figure) -> None:
    """Every word lies inside the figure, and neither two lines of the heading nor a panel's titles on each other.

    In a file, and as coarse as in a notebook, where letters are wider.
    """
    sharp = figure.get_dpi()
    for dots_per_inch in (plots.NOTEBOOK_DPI, sharp):
        figure.set_dpi(dots_per_inch)
        assert_readable_now(figure)


def assert_readable_now(figure: Figure) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    renderer = canvas.get_renderer()
    unseen = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in ticks_out_of_view(axis)
    }
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible() and text not in unseen:
            box = text.get_window_extent(renderer)
            assert -2 <= box.x0 <= box.x1 <= width + 2, text.get_text()
            assert -2 <= box.y0 <= box.y1 <= height + 2, text.get_text()
    for axes in figure.axes:
        name, note = axes.title, axes._right_title
        name = axes._left_title if axes._left_title.get_text() else name
        if name.get_text() and note.get_text():
            assert name.get_window_extent(renderer).x1 < note.get_window_extent(renderer).x0, (
                name.get_text()
            )
    lines = [text.get_window_extent(renderer) for text in figure.texts]
    assert all(lower.y1 <= upper.y0 + 3 for upper, lower in itertools.pairwise(lines))


def test_overlay_shows_colour_number_and_weight_of_the_first_choice():
    trace = make_trace()
    layer = trace.layers[1]
    layer.kept[1, 5, 0] = False
    figure = plots.plot_overlay(PICTURE, replace(trace, layers=(trace.layer(3),)), 1)
    axes = figure.axes[1]
    numbers = [text.get_text() for text in axes.texts]
    first = layer.expert_index[1, :, 0]
    assert numbers == ["×" if patch == 5 else str(first[patch]) for patch in range(16)]
    cells = np.asarray(axes.images[1].get_array()).reshape(16, 4)
    assert [to_hex(cell).upper() for cell in cells] == [EXPERT_COLOURS[expert] for expert in first]
    assert cells[5, 3] == 0
    rest = np.delete(np.arange(16), 5)
    order = np.argsort(layer.combine_weight[1, rest, 0])
    assert (np.diff(cells[rest, 3][order]) > 0).all()  # opacity grows with the gate weight
    assert "dog, predicted dog (33 %)" in heading_of(figure)


def test_overlay_of_many_experts_is_grey():
    figure = plots.plot_overlay(PICTURE, make_trace(experts=64), 0)
    cells = np.asarray(figure.axes[1].images[1].get_array()).reshape(16, 4)
    assert {to_hex(cell).upper() for cell in cells} == {NEUTRAL}


def test_load_bars_have_the_shares_the_ideal_and_the_slowest():
    figure = plots.plot_load([[10, 20, 30, 40], [25, 25, 25, 25]], ["L1", "L3"])
    bars = [
        patch.get_height() for patch in figure.axes[0].patches[4:]
    ]  # behind them the four requested loads
    np.testing.assert_allclose(bars, [0.1, 0.2, 0.3, 0.4])
    assert figure.axes[0].lines[0].get_ydata()[0] == 0.25  # type: ignore[index]
    assert "max/mean load 1.60" in words(figure.axes[0])  # 40 / 25
    assert "max/mean load 1.00" in words(figure.axes[1])


def test_load_bars_show_what_was_dropped():
    figure = plots.plot_load([[20, 20]], ["L1"], requested=[[60, 20]])
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    np.testing.assert_allclose(
        heights, [0.75, 0.25, 0.25, 0.25]
    )  # requested, then computed, of 80 choices
    assert "dropped" in heading_of(figure)


SHARE = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])


def class_map(share, significant, names, layer_name="L1"):
    excess = share - np.nanmean(share, axis=0)
    return plots.plot_class_experts(
        share, significant, names, layer_name=layer_name, excess=excess, threshold=0.1
    )


def test_only_significant_cells_are_coloured():
    significant = np.array([[True, False, False], [False, True, False], [False, False, False]])
    figure = class_map(SHARE, significant, ["cat", "dog", "owl"])
    axes = figure.axes[0]
    drawn = axes.images[0].get_array()
    assert isinstance(drawn, np.ma.MaskedArray)
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["cat", "dog", "owl"]  # each prefers another expert, in the order of the experts
    np.testing.assert_array_equal(~drawn.mask, significant)
    np.testing.assert_allclose(drawn.compressed(), [0.5 - 1 / 3, 0.6 - 0.4])  # above the mean class
    assert to_hex(axes.get_facecolor()).upper() == BLANK  # what shows through elsewhere
    assert "2 of 9 cells" in heading_of(figure)
    assert "10.0 points" in heading_of(figure)


def test_no_significant_cell_is_said_in_words():
    figure = class_map(SHARE, np.zeros((3, 3), dtype=bool), ["a", "b", "c"])
    assert "no class" in heading_of(figure)
    assert len(figure.axes) == 1  # no colour bar without a coloured cell


def test_a_class_without_images_is_left_out():
    share = np.vstack([SHARE, np.full(3, np.nan)])
    figure = class_map(share, share > 0.5, ["cat", "dog", "owl", "ghost"])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "dog", "owl"]
    assert "1 of 9 cells" in heading_of(figure)


def test_of_a_thousand_classes_those_with_the_largest_effect_are_shown():
    rng = np.random.default_rng(0)
    share = np.full((1000, 8), 0.125)
    strong = rng.choice(1000, 25, replace=False)
    share[strong, 0] += 0.2
    share[strong, 1] -= 0.1
    share[strong, 2] -= 0.1
    figure = class_map(share, share > 0.3, [f"class {i}" for i in range(1000)])
    shown = {label.get_text() for label in figure.axes[0].get_yticklabels()}
    assert shown == {f"class {i}" for i in strong}
    assert "25 of 1000 classes" in heading_of(figure)


def test_part_map_shares_areas_and_absent_parts():
    # 8 patches of part a (6 to expert 0) and 2 of part c, all to expert 1; part b doesn't occur.
    figure = plots.plot_part_experts([[6, 2], [0, 0], [0, 2]], ["a", "b", "c"], layer_name="L1")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (80 %)", "c (20 %)"]
    drawn = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(
        drawn, [[0.75 - 0.6, 0.25 - 0.4], [0 - 0.6, 1 - 0.4]]
    )  # against 6 : 4 of all patches
    assert "Nothing is tested" in heading_of(figure)


def test_gallery_shows_top_and_random_patches_and_an_idle_expert():
    trace = make_trace(experts=4, layers=1)
    layer = trace.layers[0]
    layer.expert_index[layer.expert_index == 3] = 2  # nothing goes to expert 3
    figure = plots.plot_gallery(PICTURES, trace, 1, count=2)
    axes = figure.axes[0]
    # One top patch at most of each of three images, so two of each kind for three busy experts.
    assert len(axes.images) == 3 * 4
    assert " ".join(words(axes)).count("no patch goes") == 1
    values = {int(np.asarray(image.get_array()).max()) for image in axes.images}
    assert values <= {10, 20, 30}
    assert f"{100 * np.mean(layer.expert_index == 0):.1f} %" in words(axes)


@pytest.mark.deep
@pytest.mark.parametrize(
    ("experts", "top_k", "layers", "grid"),
    [(2, 1, 1, (2, 2)), (8, 2, 3, (8, 8)), (9, 3, 6, (7, 7)), (64, 4, 12, (14, 14))],
)
def test_all_sizes_are_readable(experts, top_k, layers, grid):
    trace = make_trace(2, grid, experts, top_k, layers)
    picture = PICTURE[:28, :28].repeat(2, 0).repeat(2, 1)  # 56 pixels: a multiple of every grid
    names = [layer.name for layer in trace.layers]
    layer = trace.layers[-1]
    figures = [
        plots.plot_overlay(picture, trace, 0),
        plots.plot_load(np.stack([layer.counts().sum(0) for layer in trace.layers]), names),
        plots.plot_part_experts(np.ones((10, experts)), ["background"] * 10, layer_name=layer.name),
    ]
    for figure in figures:
        assert_readable(figure)
        assert figure.get_size_inches().max() < 17


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_any_number_of_classes_is_readable(classes):
    share = np.random.default_rng(0).dirichlet(np.ones(8), classes)
    names = [f"{'a very long class name ' * (i % 3)}{i}" for i in range(classes)]
    assert_readable(class_map(share, share > 0.3, names, "L11"))


def test_threads_draw_the_same_picture():
    trace = make_trace()

    def draw(_: int) -> bytes:
        return plots.figure_png(plots.plot_overlay(PICTURE, trace, 0))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(draw, range(4))) == [draw(0)] * 4


def test_a_figure_is_a_png_of_its_size():
    assert_readable(
        plots.plot_load([[30, 10]] * 4, ["L1, balanced", "L3, balanced", "L1, not balanced", "L3"])
    )
    figure = plots.plot_load([[1, 1]], ["L1"])
    with Image.open(io.BytesIO(plots.figure_png(figure))) as picture:
        assert picture.format == "PNG"
        np.testing.assert_allclose(picture.size, figure.get_size_inches() * 200, atol=1)


def test_wrap_keeps_words_whole_and_measures_the_font():
    small, large = FontProperties(size=7), FontProperties(size=14)
    text = "one two three extraordinarily"
    assert wrap_text(text, 0.1, small) == text.split()  # nothing fits beside another word
    assert wrap_text(text, 100, small) == [text]
    assert wrap_text("", 1, small) == []
    # A font twice as large fills lines that are twice as long in the same way.
    assert wrap_text(text * 9, 1.5, small) == wrap_text(text * 9, 3.0, large)


def test_dollars_in_names_are_no_formula():
    figure = class_map(SHARE, SHARE > 0.5, ["$a$", "b^$", "$c_1$"], "$L$")
    assert_readable(figure)
    assert not any(
        label.get_parse_math() for label in figure.axes[0].get_yticklabels() + figure.texts
    )


def test_ticks_of_small_shares_are_told_apart():
    # 64 equal loads of 1.5625 % have their ticks below 2.2 %: whole percents would say "2%" twice.
    figure = plots.plot_load(np.ones((1, 64)), ["L1"])
    figure.draw_without_rendering()
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(ticks) == len(set(ticks)) > 2


def test_a_figure_is_a_cells_result_without_pyplot():
    figure = plots.plot_load([[3, 5]], ["L1"])
    png = figure._repr_mimebundle_()["image/png"]
    with Image.open(io.BytesIO(png)) as shown:
        assert shown.size == tuple(int(side * 110) for side in figure.get_size_inches())
