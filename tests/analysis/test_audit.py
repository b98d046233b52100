"""`moevision audit`: findings by hand, planted faults, blocks from elsewhere, and what its user may do wrong."""

import html
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from moevision.analysis import Choices, RecordedLayer, Recording, RoutingTrace, collect_routing
from moevision.analysis.audit import (
    constant_routes,
    dead_experts,
    find,
    knock_out,
    label_leak,
    permuted_experts,
    remove_each,
)
from moevision.analysis.images import open_pictures
from moevision.analysis.information import ratio_interval
from moevision.analysis.questions import three_questions
from moevision.analysis.readings import choices_of
from moevision.demo import bundled_model
from moevision.layers import forward_routing
from moevision.models.io import SavedModel
from moevision.models.safe_files import read_json
from tests.shared import draw_folder, load_script, refused, run_cli, says, succeeded

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """120 drawn cats and dogs, 15 of each by class and file."""
    return draw_folder(tmp_path_factory.mktemp("data") / "pets", per_class=60)


# ---- numbers by hand


def layer_of(choices, num_experts, **more):
    return RecordedLayer("L0", np.asarray(choices), num_experts, **more)


def test_dead_experts_by_hand():
    """An image uses one of four experts: an even router leaves one out of 10 images with 4 · 0.75^10 = 0.23."""
    of_ten = layer_of((np.arange(10) % 3).reshape(10, 1, 1), 4)
    found = dead_experts(of_ten)
    assert found.found is False
    assert says(found.detail, "E3 of 4", "10 images", "--limit")
    # 4 · 0.75^21 = 0.0095 and 4 · 0.75^20 = 0.0127; two layers are suspected twice as often.
    for images, layers, expected in ((20, 1, False), (21, 1, True), (21, 2, False)):
        layer = layer_of((np.arange(images) % 3).reshape(images, 1, 1), 4)
        assert dead_experts(layer, layers).found is expected
    assert says(dead_experts(layer_of([[[0, 1]]] * 2, 2)).detail, "none of 2")


def test_constant_routes_by_hand():
    """Each place has its own expert in 99 of 100 images: 1 % leave it. Agresti and Min's upper end is 2.9 %."""
    choices = np.tile([[0], [1]], (100, 1, 1))
    choices[0] = 2
    found = constant_routes(layer_of(choices, 3))
    assert found.found is True
    assert says(found.detail, "99.0 %")
    assert "everywhere" not in found.detail
    one_set = constant_routes(layer_of([[[2, 0]], [[0, 2]]] * 50, 4))  # as a set they are the same
    assert says(one_set.detail, "100.0 %", "everywhere to E0 and E2")
    # Of 30 images none leaves it; 1.96 / 32 = 6.1 % may: too few to accuse.
    assert constant_routes(layer_of([[[2, 0]]] * 30, 4)).found is False
    soft = layer_of([[[2, 0]]] * 50, 4, tokens_choose=False)
    assert constant_routes(soft).found is None


def right_at(expert, images=240):
    """Two classes, one patch; an image needs the expert of its number mod 3. At `expert` of it the answer is right.

    `expert` maps the needed one to where it is. Log-loss is log(1 + e^-4) there, and log(1 + e^0) elsewhere.
    """
    labels = np.arange(images) // 3 % 2
    needed = np.arange(images) % 3

    def run(index, rows, experts):
        score = 4.0 * (experts[:, 0, 0] == np.asarray(expert)[needed[rows]])
        return np.stack([score * (labels[rows] == 0), score * (labels[rows] == 1)], 1)

    layer = layer_of(needed.reshape(-1, 1, 1), 3)
    return Recording(labels, [layer], ["cat", "dog"], run=run)


GAIN = np.log(2) - np.log(1 + np.exp(-4))
"""Log-loss between the right expert and another one."""


def test_knock_out_by_hand():
    """Each third of the images loses its expert and all it knows: a third of the log-loss, and half of a third right.

    Without knowledge the answer is cat, which is right for half.
    """
    recording = right_at([0, 1, 2])
    losses, pairs = remove_each(recording, 0, 4000, 0)
    found = knock_out(recording.layers[0], losses)
    assert found.found is None
    for cost in found.costs:
        assert cost.log_loss.value == pytest.approx(GAIN / 3)
        assert cost.points.value == pytest.approx(100 / 6)
        assert cost.moved == pytest.approx(1 / 3)
    assert says(found.detail, "3 of 3 experts cost", "16.7 points")
    healthy = permuted_experts(recording.layers[0], pairs)
    assert healthy.found is False
    assert says(healthy.detail, "0 of 6 pairs")


def test_permuted_experts_by_hand():
    """What needs expert 0 goes there, but its weights lie at 1; 1's lie at 2, and 2's at 0."""
    recording = right_at([1, 2, 0])
    _, pairs = remove_each(recording, 0, 4000, 0)
    assert {pair: values.mean() for pair, values in pairs.items()} == {
        (expert, other): pytest.approx(-GAIN if other == (expert + 1) % 3 else 0)
        for expert, other in pairs
    }
    found = permuted_experts(recording.layers[0], pairs)
    assert found.found is True
    assert says(found.detail, "3 of 6 pairs", "E0 at E1", f"−{GAIN:.3f}")


def test_a_removed_experts_patches_go_to_their_next_choice_if_they_name_one():
    """Patches choose expert 0, and rank 2 next, which isn't computed (~2); a patch without one gets a drawn expert."""
    seen = []

    def run(index, rows, experts):
        seen.append(experts)
        return np.zeros((len(rows), 2))

    choices = np.tile([[0, ~2], [1, ~1]], (40, 1, 1))
    recording = Recording(np.arange(40) % 2, [layer_of(choices, 4)], ["cat", "dog"], run=run)
    remove_each(recording, 0, 4000, 0)
    (routes,) = seen
    removed = routes[(routes[:, 0, 0] != 0)]
    drawn, ranked = removed[:, 0, 0], np.flatnonzero(removed[:, 0, 0] == 2)
    assert set(drawn) == {1, 2, 3}
    assert len(ranked) >= 40  # all images by rank, and those that drew it
    assert (removed[:, 0, 1] == ~2).all()


def test_label_leak_by_hand():
    """The experts are the classes, so that they tell all; of 40 images the model has 20, 39 or 40 right, chance 20.

    39 of 40 is 0.975 +- 0.051, and 2.33 / 1.96 times that reaches 1: too few to accuse.
    """
    labels = np.arange(40) % 2
    recording = Recording(labels, [layer_of(labels.reshape(-1, 1, 1), 2)], ["cat", "dog"])
    (answers,) = three_questions(recording, permutations=20)
    for right, expected in ((20, True), (39, False), (40, False)):
        found = label_leak(answers, ratio_interval(np.arange(40) < right))
        assert found.found is expected
        assert says(found.detail, "guess 100.0 %", f"model {2.5 * right:.1f} %", "chance 50.0 %")
    assert label_leak(answers, None).found is None


def test_next_choices_are_those_of_weight_0():
    """Two of three experts have a weight; dropped choices copy the first, and none is computed."""
    experts = torch.tensor([[[2, 0, 1]], [[1, -1, 0]]])
    weights = torch.tensor([[[3.0, 1, 0]], [[1, 5, 0]]])
    routing = Choices(experts, 4, weights).routing(0, 1)
    assert routing.kind == "token_choice"
    assert routing.expert_index.tolist() == [[[2, 0, 1]], [[1, 1, 0]]]
    assert routing.kept.tolist() == [[[True, True, False]], [[True, False, False]]]
    assert routing.probs.tolist() == [[[0.25, 0, 0.75, 0]], [[0, 1, 0, 0]]]


def test_a_block_that_weighs_all_experts_is_soft():
    weights = torch.tensor([[[0.1, 0.7, 0.2]]]).expand(2, 4, 3)
    routing = Choices(torch.arange(3).expand(2, 4, 3), 3, weights).routing(5, 4)
    assert (routing.kind, routing.layer, routing.grid) == ("soft", 5, (2, 2))
    assert routing.expert_index[0, 0].tolist() == [1, 2, 0]
    torch.testing.assert_close(routing.probs, weights)


# ---- planted faults: 100 draws of each


IMAGES, PATCHES, EXPERTS = 240, 4, 4


def drawn(fault, seed):
    """The findings that accuse, of 240 images of four classes; what their experts do is drawn.

    A patch needs one expert, drawn at random, and where it gets that its image's true logit rises by 1, plus noise of
    its own for each expert. Without experts the model is right on about half of the images.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(IMAGES) % 4
    if fault == "uneven classes":
        labels = rng.choice(4, IMAGES, p=[0.7, 0.1, 0.1, 0.1])
    needed = rng.integers(EXPERTS, size=(IMAGES, PATCHES))
    if fault == "leak":
        told = rng.random((IMAGES, PATCHES)) < 0.8
        needed = np.where(told, labels[:, None], needed)
    elif fault == "dead half":
        needed %= EXPERTS // 2
    elif fault == "whole images":
        needed[:] = needed[:, :1]
    elif fault == "constant":
        needed = np.where(rng.random((IMAGES, PATCHES)) < 0.01, needed, 1)
    place = {"permuted": (np.arange(EXPERTS) + 1) % EXPERTS}.get(fault, np.arange(EXPERTS))
    spread = 5 if fault == "confident answers" else 1  # few images lose much, most nothing
    base = rng.normal(0, spread, (IMAGES, 4))
    noise = rng.normal(0, 0.3 * spread, (IMAGES, EXPERTS, 4))
    useful = 0.0 if fault == "idle experts" else 0.4

    def run(index, rows, experts):
        chosen = experts[..., 0]
        logits = base[rows]
        for patch in range(PATCHES):
            here = chosen[:, patch]
            computed = (here >= 0)[:, None]
            logits = logits + np.where(computed, noise[rows, here], 0) / PATCHES
            logits[np.arange(len(rows)), labels[rows]] += useful * (
                here == place[needed[rows, patch]]
            )
        return logits

    layer = layer_of(needed[..., None], EXPERTS)
    recording = Recording(labels, [layer], list("abcd"), run=run)
    predictions = run(0, np.arange(IMAGES), needed[..., None]).argmax(1)
    answered = three_questions(recording, permutations=20, draws=1)
    trace = SimpleNamespace(
        accuracy=(predictions == labels).mean(), predictions=predictions, labels=labels
    )
    findings = find(recording, answered, trace, seed=seed)
    return {finding.what for finding in findings if finding.found}


FAULTS = {
    "constant": "constant routes",
    "dead half": "dead experts",
    "leak": "label leak",
    "permuted": "permuted experts",
}
HEALTHY = ("useful experts", "idle experts", "whole images", "confident answers", "uneven classes")


@pytest.mark.parametrize("fault", [*FAULTS, *HEALTHY])
def test_one_draw_of_each_fault(fault):
    assert FAULTS.get(fault) in {*drawn(fault, 0), *([None] if fault in HEALTHY else [])}


@pytest.mark.deep
@pytest.mark.parametrize("fault", [*FAULTS, *HEALTHY])
def test_a_hundred_draws_of_each_fault(fault, capsys):
    """A planted fault is found in at least 95, a healthy router accused of anything in at most 5."""
    accused = [drawn(fault, seed) for seed in range(100)]
    counts = {what: sum(what in found for found in accused) for what in FAULTS.values()}
    any_of = sum(map(bool, accused))
    with capsys.disabled():
        print(f"\n{fault}: {counts}, any {any_of}")
    if fault in HEALTHY:
        assert any_of <= 5
    else:
        assert counts[FAULTS[fault]] >= 95


# ---- foreign blocks, from the file to the report


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("block", ["sparse", "soft", "whole"])
def test_a_block_from_elsewhere_is_audited(block, pets, tmp_path):
    foreign = Path(__file__).with_name("foreign.py")
    out = tmp_path / "report"
    outcome = succeeded(
        run_cli("audit", f"{foreign}:{block}", "--data", pets, "--out", out, "--quick")
    )
    said = " ".join(outcome.out.split())
    assert says(said, " of 4, on 120 images", "L0: load: max/mean", str(out))
    assert says(said, "L0: Classes go to different experts", "L0: Training the router added")
    removed = {
        "sparse": "knock-out, permuted experts: not measured (the hook takes no forced routes)",
        "soft": "knock-out, permuted experts: not measured (no patch chooses its experts here)",
        "whole": "of 4 experts cost log-loss when removed",
    }
    assert says(said, removed[block])

    numbers = read_json(out / "report.json")
    trace = RoutingTrace.load(out / "trace.safetensors")
    (layer,) = trace.layers
    assert (len(trace), trace.grid) == (120, (1, 1) if block == "whole" else (4, 4))
    assert layer.kind == ("soft" if block == "soft" else "token_choice")
    assert layer.route_by == ("image" if block == "whole" else "token")
    assert numbers["data"]["accuracy"] == trace.accuracy
    assert [finding["sentence"] for finding in numbers["findings"]] == [
        line for line in outcome.out.splitlines() if line in page_findings(numbers)
    ]
    page = (out / "report.html").read_text()
    assert all(html.escape(line) in page for line in page_findings(numbers))

    # The layer's own arithmetic, from the patches on, chooses the same experts.
    net, _ = load_net_of(foreign, block)
    images = open_pictures(pets, 32, split="all").image(0)
    pixels = torch.from_numpy(images.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    name = open_pictures(pets, 32, split="all").picture_name(0)
    index = trace.picture_names.index(name)
    with torch.no_grad():
        tokens = net.patches(pixels).flatten(2).mT
        read = tokens.mean(1) if block == "whole" else tokens[0]
        scores = read @ net.block.gate.weight.T + getattr(net.block.gate, "bias", torch.zeros(4))
    best = scores.argsort(-1, descending=True)[..., : layer.top_k]
    assert layer.expert_index[index].tolist() == best.tolist()


def page_findings(numbers):
    return [finding["sentence"] for finding in numbers["findings"]]


def load_net_of(file, block):
    """The same net once more, from a module of its own."""
    foreign = load_script(file)
    blocks = {
        "soft": lambda: foreign.Linears(by_image=False),
        "whole": lambda: foreign.Linears(by_image=True),
    }
    return foreign.load_net(blocks.get(block, foreign.sparse_block))


# ---- what its user may do wrong


class Echo(nn.Module):
    """Logits from the mean colours; no parameters but one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images.mean((2, 3))[:, :2] * self.scale


def chosen(images, patches=4, experts=2):
    return torch.arange(patches).expand(len(images), -1)[..., None] % experts


GOOD = """
import torch
from moevision.analysis import Audited, Choices
from moevision.models.io import SavedModel
from tests.analysis.test_audit import Echo, chosen

def routings(net, images, forced=None):
    return net(images), [Choices(chosen(images), 2)]

def audited(routings=routings, names=("cat", "dog")):
    return Audited(SavedModel(Echo(), list(names), 16, (0.5,) * 3, (0.5,) * 3), routings)

def answering(answer):
    return audited(lambda net, images: answer(net, images))
"""
FILES = {
    "no colon": ("my_model.py", "", ["my_model.py", "FILE.py:FUNCTION"]),
    "no file": ("none.py:audited", "", ["none.py:audited", "FILE.py:FUNCTION"]),
    "a folder": ("folder.py:audited", "", ["folder.py:audited", "FILE.py:FUNCTION"]),
    "no Python file": ("my_model.txt:audited", "", ["my_model.txt:audited", "FILE.py:FUNCTION"]),
    "no function": ("my_model.py:audit", "", ["my_model.py", "no function audit", "define it"]),
    "not callable": ("my_model.py:x", "x = 3", ["no function x"]),
    "no name": ("my_model.py:", "", ["no function ", "define it"]),
    "raises on import": ("my_model.py:f", "1 / 0", ["line 15", "ZeroDivisionError: division"]),
    "does not parse": ("my_model.py:f", "def", ["my_model.py", "SyntaxError"]),
    "leaves": ("my_model.py:f", "raise SystemExit(3)", ["SystemExit: 3"]),
    "raises": (
        "my_model.py:f",
        "def f():\n    raise KeyError('weights')",
        ["f()", "line 16 of my_model.py", "KeyError: 'weights'"],
    ),
    "a UserError of its own": (
        "my_model.py:f",
        "from moevision import UserError\ndef f():\n    raise UserError('Give more.')",
        ["moevision: Give more."],
    ),
    "returns something else": (
        "my_model.py:f",
        "def f(): return 3",
        ["f() returned int", "Audited("],
    ),
    "returns no model": (
        "my_model.py:f",
        "def f(): return Audited(Echo(), routings)",
        ["f() returned Audited", "SavedModel"],
    ),
    "returns no hook": (
        "my_model.py:f",
        "def f(): return Audited(audited().model, 3)",
        ["f() returned Audited", "routings"],
    ),
}
ANSWERS = {
    "nothing": ("None", ["The hook failed", "TypeError"]),
    "raises": ("1 / 0", ["The hook failed", "ZeroDivisionError: division by zero"]),
    "no blocks": ("net(x), []", ["no MoE block", "Choices("]),
    "another type": ("net(x), [chosen(x)]", ["no MoE block", "Choices("]),
    "no axis of choices": (
        "net(x), [Choices(chosen(x)[..., 0], 2)]",
        ["Block 0", "[30, 4]", "choices]"],
    ),
    "other images": ("net(x), [Choices(chosen(x)[1:], 2)]", ["[29, 4, 1]", "30 images"]),
    "no patches": ("net(x), [Choices(chosen(x)[:, :0], 2)]", ["[30, 0, 1]"]),
    "experts as floats": ("net(x), [Choices(chosen(x) + 0.5, 2)]", ["whole numbers"]),
    "an expert out of range": (
        "net(x), [Choices(chosen(x), 2), Choices(chosen(x) + 1, 2)]",
        ["Block 1", "expert 2", "0 to 1"],
    ),
    "other weights": (
        "net(x), [Choices(chosen(x), 2, torch.ones(30, 4, 2))]",
        ["weights [30, 4, 2]", "[30, 4, 1]"],
    ),
    "NaN weights": (
        "net(x), [Choices(chosen(x), 2, chosen(x) * torch.nan)]",
        ["weights", "finite"],
    ),
    "negative weights": ("net(x), [Choices(chosen(x), 2, chosen(x) - 1.0)]", ["at least 0"]),
    "other inputs": (
        "net(x), [Choices(chosen(x), 2, None, torch.ones(30, 5, 3))]",
        ["inputs [30, 5, 3]", "[30, 4]"],
    ),
    "NaN inputs": (
        "net(x), [Choices(chosen(x), 2, None, torch.ones(30, 4, 3) * torch.nan)]",
        ["finite"],
    ),
    "three classes": (
        "torch.ones(30, 3), [Choices(chosen(x), 2)]",
        ["[30, 3]", "[30, 2]", "class_names"],
    ),
    "logits of other images": ("net(x)[1:], [Choices(chosen(x), 2)]", ["[29, 2]", "[30, 2]"]),
    "NaN logits": ("net(x) * torch.nan, [Choices(chosen(x), 2)]", ["logits", "finite"]),
    "blocks of other grids": (
        "net(x), [Choices(chosen(x), 2), Choices(chosen(x, 9), 2)]",
        ["4 and 9 patches", "repeat"],
    ),
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return draw_folder(tmp_path_factory.mktemp("few") / "pets", per_class=15)


def audit(folder, text, address, data):
    (folder / "my_model.py").write_text(GOOD + text)
    (folder / "my_model.txt").touch()
    (folder / "folder.py").mkdir()
    return run_cli(
        "audit", f"{folder}/{address}", "--data", data, "--out", folder / "out", "--quick"
    )


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_gives_no_model(case, few, tmp_path):
    address, text, fragments = FILES[case]
    refused(audit(tmp_path, text, address, few), *fragments)


@pytest.mark.parametrize("case", ANSWERS)
def test_a_hook_that_gives_no_routing(case, few, tmp_path):
    answer, fragments = ANSWERS[case]
    text = f"def f(): return answering(lambda net, x: ({answer}))"
    refused(audit(tmp_path, text, "my_model.py:f", few), *fragments)


def test_a_hook_that_is_forced_wrongly(few, tmp_path):
    wrong = "net(x) * (1 if forced is None else -9)"
    text = (
        f"def f(): return audited(lambda net, x, forced=None: ({wrong}, [Choices(chosen(x), 2)]))"
    )
    refused(audit(tmp_path, text, "my_model.py:f", few), "forced to block 0's own", "weight")


def test_a_hook_that_does_not_force(few, tmp_path):
    """Without its experts the block computes what it does with them."""
    text = "def f(): return audited(lambda net, x, forced=None: (net(x), [Choices(chosen(x), 2)]))"
    outcome = succeeded(audit(tmp_path, text, "my_model.py:f", few))
    assert says(outcome.out, "knock-out, permuted experts: not measured (no logit reads these")


@pytest.mark.whole
@pytest.mark.parametrize(
    ("hook", "why"),
    [
        ("lambda net, x: (net(x), [Choices(chosen(x), 2)])", "the hook takes no forced routes"),
        (
            "lambda net, x, forced=None: (None, [Choices(chosen(x), 2)])",
            "the hook returns no logits of these",
        ),
    ],
)
def test_what_a_hook_lacks_is_said(hook, why, few, tmp_path):
    outcome = succeeded(audit(tmp_path, f"def f(): return audited({hook})", "my_model.py:f", few))
    assert says(
        outcome.out,
        f"knock-out, permuted experts: not measured ({why}",
        f"different things: not measured ({why}",
    )
    # Every image's routes are the same: its patch's number mod 2.
    assert says(outcome.out, "constant routes: not found: 100.0 % of the patches", "too few images")
    assert ("label leak: not measured" in outcome.out) is (hook.count("None") > 0)


def test_blocks_of_images_and_of_patches_share_a_trace(few):
    """The second block routes whole images: all its patches have one expert."""
    model = SavedModel(Echo(), ["cat", "dog"], 16, HALF, HALF)

    def hook(net, images):
        return net(images), [Choices(chosen(images), 2), Choices(chosen(images, 1), 2)]

    trace = collect_routing(model, few, split="all", routings=hook, progress=False)
    assert [layer.route_by for layer in trace.layers] == ["token", "image"]
    assert trace.grid == (2, 2)
    assert trace.layers[0].expert_index[7, :, 0].tolist() == [0, 1, 0, 1]
    assert trace.layers[1].expert_index[7, :, 0].tolist() == [0, 0, 0, 0]


def test_one_of_our_models_by_a_hook_gets_the_same_answers():
    """A hook that repeats what `forward_routing` says: the same trace, class information and load."""
    model = bundled_model("pets")
    pictures = open_pictures("synthetic_pets", model.image_size, limit=48)

    def hook(net, images):
        logits, routings = forward_routing(net, images)
        blocks = []
        for routing in routings:
            patches = slice(routing.num_prefix_tokens, None)
            experts = routing.expert_index.where(routing.kept, -1)[:, patches]
            blocks.append(Choices(experts, routing.num_experts, routing.combine_weight[:, patches]))
        return logits, blocks

    ours = collect_routing(model, pictures, progress=False)
    theirs = collect_routing(model, pictures, progress=False, routings=hook)
    assert ours.accuracy == theirs.accuracy
    recordings = []
    for trace in (ours, theirs):
        layers = [replace(choices_of(layer), name="L") for layer in trace.layers]
        recordings.append(Recording(trace.labels, layers, trace.class_names))
    by_us, by_hook = (three_questions(recording, permutations=20) for recording in recordings)
    for our, their in zip(by_us, by_hook, strict=True):
        assert our.answers[0] == their.answers[0]
        assert our.load.share.tolist() == their.load.share.tolist()
