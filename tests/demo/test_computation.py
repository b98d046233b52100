"""The numbers of the computation card are the model's: equal to `record_routing` and to the experts of `reference.py`.

Nothing of the demo computes the expected values: the model's blocks are run by hand, and each expert as the plain MLP
of `layers/reference.py`, one by one.
"""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from moevision.analysis.collect import network_input
from moevision.analysis.intervention import Intervention
from moevision.demo import route_image
from moevision.demo.facts import describe, noise_of_training
from moevision.demo.view import LayerActivations, Settings
from moevision.demo.wire import encode_float32
from moevision.layers import ROUTERS, record_routing, routing_lock
from moevision.layers.reference import Expert
from moevision.layers.routing import STEPS
from tests.demo.conftest import forward

WAYS = {
    **{name: {"router": name} for name in ROUTERS},
    "noisy_top_1": {"router": "noisy_top_k", "top_k": 1},
    "capacity": {"eval_capacity_factor": 0.5},
    "balanced capacity": {
        "router": "bias_balanced",
        "eval_capacity_factor": 0.5,
        "batch_priority": True,
    },
    "by image": {"route_by": "image"},
    "normalised": {"normalize_gates": True},
    "normalised choice": {"router": "expert_choice", "normalize_gates": True},
    "shared experts": {"num_shared_experts": 2},
    "class token": {"class_token": True, "global_pool": "token"},
    "soft, class token": {
        "router": "soft",
        "slots_per_expert": 3,
        "class_token": True,
        "global_pool": "token",
    },
    "dense": {"backend": "dense"},
    "dense soft": {"backend": "dense", "router": "soft"},
    "layer scale": {"init_values": 0.1},
}


def unpacked(value):
    """What `encode_float32` wrote, with the largest error that it allows."""
    whole = np.frombuffer(base64.b64decode(value["data"]), "<i2").reshape(value["shape"])
    return whole * value["unit"]


def shaken(model):
    """The model with random weights where a fresh one has zeros, so that no number is equal to another by accident."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in [*model.net.named_parameters(), *model.net.named_buffers()]:
            if value.is_floating_point() and ("mlp" in name or "norm" in name):
                value += 0.1 * torch.randn(value.shape, generator=generator)
    return model


@torch.no_grad()
def by_hand(model, pixels):
    """For each MoE layer its routing, what its experts give, the sum, and the stream before and after; all tokens."""
    net = model.net
    x = net.norm_pre(net._pos_embed(net.patch_embed(network_input(model, pixels[None]))))
    layers = []
    for block in net.blocks:
        if hasattr(block.mlp, "experts"):
            before = x + block.ls1(block.attn(block.norm1(x)))
            tokens = block.norm2(before)
            with record_routing(block.mlp) as routings:
                block.mlp(tokens)
            outputs, total = mixed(block.mlp, tokens[0], routings[0])
            after = before[0] + block.ls2(total)
            layers.append((block.mlp, tokens[0], routings[0], outputs, total, before[0], after))
        x = block(x)
    return layers


def mixed(layer, tokens, routing):
    """[N, E, D] what each expert gives for each token, and [N, D] their weighted sum with the shared experts."""
    experts = [reference_expert(layer.experts, number) for number in range(routing.num_experts)]
    weights = routing.expert_weights()[0]  # [N, E]
    if routing.kind == "soft":
        takes = routing.slot_weight[0]  # [N, E, S]
        slots = torch.einsum("nd,nes->esd", tokens, routing.dispatch_weight[0])
        outputs = torch.stack(
            [takes[:, e] @ expert(slots[e]) for e, expert in enumerate(experts)], 1
        )
        outputs = outputs / takes.sum(-1, keepdim=True)  # a mean of the expert's slots
    else:
        outputs = torch.stack([expert(tokens) for expert in experts], 1)
    total = (outputs * weights.unsqueeze(-1)).sum(1)
    return outputs, total if layer.shared is None else total + layer.shared(tokens)


def reference_expert(packed_experts, number):
    dim, hidden = packed_experts.fc1.in_features, packed_experts.fc1.out_features
    expert = Expert(dim, hidden)
    expert.load_state_dict(
        {name: value.detach()[number] for name, value in packed_experts.named_parameters()}
    )
    return expert


def lengths(vectors):
    return vectors.norm(dim=-1).numpy()


def close(value, expected):
    """Equal to half a unit of the packed number, plus what float32 loses."""
    expected = np.asarray(expected)
    assert np.abs(unpacked(value) - expected).max() <= value["unit"] / 2 + 2e-5 * max(
        1, np.abs(expected).max()
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_numbers_are_those_of_the_model_and_of_the_reference(make, pixels, way):
    model = shaken(make(**WAYS[way]))
    view = route_image(model, pixels).to_json()
    expected = by_hand(model, pixels)
    assert len(view["layers"]) == len(expected) == 2
    for shown, (layer, _, routing, outputs, total, before, after) in zip(
        view["layers"], expected, strict=True
    ):
        first = model.net.num_prefix_tokens
        numbers = shown["computation"]
        close(numbers["scores"], routing.logits[0, first:])
        index = routing.expert_index[0, first:]  # [P, K]
        each = np.take_along_axis(lengths(outputs)[first:], index.numpy(), -1)
        if shown["kind"] == "expert_choice":  # the others come last, and gave nothing
            each = each * routing.kept[0, first:].numpy()
        close(numbers["outputs"], each)
        close(numbers["total"], lengths(total)[first:])
        close(numbers["before"], lengths(before)[first:])
        close(numbers["after"], lengths(after)[first:])
        if layer.shared is None:
            assert numbers["shared"] is None
        else:
            assert unpacked(numbers["shared"]).min() > 0
        bias = getattr(layer.router, "bias", None)
        assert (numbers["bias"] is None) == (bias is None)
        if bias is not None:
            close(numbers["bias"], bias)
        of = numbers["channels"]
        changed = np.abs((after - before).numpy()[first:]).mean(0)
        assert of["index"] == sorted(np.argsort(-changed)[:8].tolist())
        assert (of["of"], of["hidden"]) == (before.shape[-1], layer.experts.fc1.out_features)
        for name, value in (("total", total), ("before", before), ("after", after)):
            close(of[name], value.numpy()[first:][:, of["index"]])
        given = np.take_along_axis(outputs.numpy()[first:], index.numpy()[..., None], 1)[
            ..., of["index"]
        ]
        kept = routing.kept[0, first:].numpy()[..., None] if shown["kind"] == "expert_choice" else 1
        close(of["outputs"], given * kept)


@pytest.mark.parametrize("way", WAYS)
def test_the_channels_add_up(make, pixels, way):
    """Σ weight · output + shared = total; before + scale · total = after: by the numbers of the view alone."""
    for layer in route_image(shaken(make(**WAYS[way])), pixels).to_json()["layers"]:
        of = layer["computation"]["channels"]
        value = {name: unpacked(one) for name, one in of.items() if isinstance(one, dict)}
        outputs = value["outputs"]
        for patch, (weights, kept) in enumerate(zip(layer["weights"], layer["kept"], strict=True)):
            gates = np.array(weights) * kept
            total = (
                gates @ outputs[patch, : len(gates)] + value.get("shared", np.zeros((99, 8)))[patch]
            )
            assert total == pytest.approx(value["total"][patch], abs=2e-3)
            assert value["before"][patch] + value["scale"] * total == pytest.approx(
                value["after"][patch], abs=2e-3
            )


def test_an_intervention_shows_what_was_computed_under_it(make, pixels):
    model = shaken(make())
    change = Settings(intervention=Intervention("force", layer=3, expert=2))
    before, after = (
        route_image(model, pixels, settings=one).to_json()["layers"] for one in (Settings(), change)
    )
    assert after[0]["computation"] == before[0]["computation"]
    assert after[1]["computation"]["scores"] == before[1]["computation"]["scores"]
    outputs = lengths(by_hand(model, pixels)[1][3])  # [P, E]
    assert [choices[0] for choices in after[1]["experts"]] == [2] * 16
    close(
        after[1]["computation"]["outputs"],
        np.take_along_axis(outputs, np.array(after[1]["experts"]), -1),
    )


NOISY = {
    **{
        name: WAYS[name]
        for name in ("noisy_top_k", "vmoe_top_k", "cosine", "expert_choice", "by image", "capacity")
    },
    "jitter": {"router": "switch", "noise": "jitter", "top_k": 1},
    "one layer": {"router": ["vmoe_top_k", "soft"], "top_k": [2, 1]},
}


@pytest.mark.parametrize("way", NOISY)
def test_noise_is_what_the_routers_draw_in_training(make, pixels, way):
    model = shaken(make(**NOISY[way]))
    clean = route_image(model, pixels).to_json()["layers"]
    state = torch.get_rng_state()
    shown, again, other = (
        route_image(model, pixels, settings=Settings(noise=seed)).to_json()["layers"]
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert shown == again
    assert route_image(model, pixels).to_json()["layers"] == clean
    # The limit of evaluation stays, which training needn't have.
    limit = {"capacity_factor": 0.5} if way == "capacity" else {}
    for layer, before, another, routing in zip(
        shown, clean, other, in_training(shaken(make(**NOISY[way], **limit)), pixels), strict=True
    ):
        numbers = layer["computation"]
        if layer["noise"] == "none":
            assert numbers["noise"] is None
            assert layer["steps"] == before["steps"]
            continue
        assert "with noise" in layer["steps"]["scores"]
        assert before["computation"]["noise"] is None
        kept = (
            routing.kept[0].numpy()
            if layer["kind"] == "expert_choice"
            else np.full(routing.kept.shape[1:], True)
        )
        for name, value in (("experts", routing.expert_index), ("weights", routing.combine_weight)):
            assert np.concatenate(layer[name]) == pytest.approx(value[0].numpy()[kept], abs=5.1e-5)
        noise = unpacked(numbers["noise"])
        assert unpacked(numbers["scores"]) + noise == pytest.approx(
            routing.noisy_logits[0].numpy(), abs=1e-3
        )
        assert np.abs(noise - unpacked(another["computation"]["noise"])).max() > 1e-3
    assert shown[0]["computation"]["scores"] == clean[0]["computation"]["scores"]
    assert (way == "capacity") == (
        not all(kept for layer in shown for row in layer["kept"] for kept in row)
    )


def test_no_other_request_comes_between_the_noise_and_the_clean_scores(make, pixels, monkeypatch):
    model, free, computation = make(), [], LayerActivations.computation

    def ask_first(*arguments, **options):
        with ThreadPoolExecutor(1) as elsewhere:
            free.append(elsewhere.submit(routing_lock(model.net).acquire, blocking=False).result())
        return computation(*arguments, **options)

    monkeypatch.setattr(LayerActivations, "computation", ask_first)
    route_image(model, pixels, settings=Settings(noise=1))
    assert free == [False, False]


def test_noise_of_one_model_waits_for_that_of_another(make):
    entered = threading.Event()

    def enter(model):
        with noise_of_training(model.net, 2):
            entered.set()

    thread = threading.Thread(target=enter, args=[make(1)])
    with noise_of_training(make().net, 1):
        thread.start()
        assert not entered.wait(0.2)
    thread.join()
    assert entered.is_set()


@pytest.mark.parametrize(
    "options", [{"batch_priority": True}, {"route_by": "image", "capacity_group": "batch"}]
)
def test_noise_of_a_model_with_a_limit_in_training_alone(make, pixels, options):
    model = make(capacity_factor=1.25, **options)
    view = route_image(model, pixels, settings=Settings(noise=1))
    assert all(layer.computation.noise.any() and layer.kept.all() for layer in view.layers)


@torch.no_grad()
def in_training(model, pixels):
    """What each layer decides where the routers alone are in training, after the seed 3."""
    for block in model.net.blocks:
        if hasattr(block.mlp, "router"):
            block.mlp.router.train()
    torch.manual_seed(3)
    return forward(model, pixels)[1]


def test_listening_costs_no_second_pass_and_leaves_nothing_behind(make, pixels):
    model = make()
    facts = describe(model)
    passes = []
    handle = model.net.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    route_image(model, pixels, facts=facts)
    handle.remove()
    assert len(passes) == 1
    assert not any(module._forward_hooks for module in model.net.modules())


def test_a_layer_that_stands_in_no_residual_branch_says_nothing_of_the_stream(make, pixels):
    model = make()
    block = model.net.blocks[3]
    block.norm2 = torch.nn.Sequential(block.norm2)
    block.mlp = torch.nn.Sequential(torch.nn.Identity(), block.mlp)
    numbers = route_image(model, pixels).to_json()["layers"][1]["computation"]
    assert [numbers[name] for name in ("before", "after")] == [None] * 2
    assert numbers["total"] is not None


@pytest.mark.parametrize("shape", [(0, 4), (3,), (2, 5)])
def test_packed_numbers_are_off_by_half_a_unit_at_most(shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 12
    written = encode_float32(values)
    assert unpacked(written).shape == shape
    assert np.abs(unpacked(written) - values).max(initial=0) <= written["unit"] / 2 + 1e-6
    assert len(written["data"]) <= 4 * (values.size * 2 + 2) / 3
    assert unpacked(encode_float32(np.zeros(3, np.float32))).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "step", "words"),
    [
        ({}, "weights", "belonged to the other experts, and is left out"),
        ({}, "scores", "Training adds noise of size 1/4"),
        ({"noise": "none"}, "scores", "one learned direction per expert."),
        ({"router": "switch", "noise": "jitter"}, "scores", "shakes the patch by up to 1%"),
        ({"normalize_gates": True}, "weights", "add up to 1"),
        ({"router": "noisy_top_k"}, "scores", "as strong as a second learned map says"),
        ({"router": "noisy_top_k"}, "weights", "Softmax over the kept scores alone"),
        ({"router": "noisy_top_k", "top_k": 1}, "weights", "is left out"),
        ({"router": "sigmoid"}, "shares", "experts don't compete"),
        ({"router": "bias_balanced"}, "kept", "enters no weight"),
        ({"router": "cosine"}, "scores", "angle"),
        ({"eval_capacity_factor": 0.5}, "kept", "capacity factor 0.5) turns away the last patches"),
        (
            {"eval_capacity_factor": 0.5, "batch_priority": True},
            "kept",
            "turns away the smallest weights",
        ),
        ({"router": "expert_choice"}, "kept", "Experts choose patches"),
        ({"router": "expert_choice", "normalize_gates": True}, "weights", "divided by their sum"),
        ({"router": "soft"}, "kept", "Nothing is left out"),
        ({"router": "hash"}, "scores", "A hash of the patch's position decides"),
        ({"router": "random"}, "scores", "in training a new one each time"),
        ({"router": "position"}, "scores", "from top to bottom, decides"),
        ({"router": "colour"}, "scores", "The nearest of a few colours decides"),
        ({"route_by": "image"}, "scores", "The image is routed as a whole"),
    ],
)
def test_each_router_says_what_it_does(make, arguments, step, words):
    for router in describe(make(**arguments)).routers:
        assert set(router.steps) == set(STEPS)
        assert words in router.steps[step]


@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_weights_add_up_to_1_where_the_words_say_so(make, pixels, way, top_k):
    model = shaken(make(**WAYS[way]))
    settings = Settings(top_k=top_k if describe(model).max_top_k else None)
    layer = route_image(model, pixels, settings=settings).to_json()["layers"][1]
    sums = np.array([sum(weights) for weights in layer["weights"] if weights])
    words = layer["steps"]["weights"].replace("needn't add up to 1", "")
    says = "add up to 1" in words or "divided by their sum" in words
    assert (np.abs(sums - 1).max() < 2e-3) == says


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"eval_capacity_factor": 1.25}, "capacity factor 0.3) turns away the smallest weights"),
        ({}, "capacity factor 0.3) turns away the smallest weights"),
        ({"router": "bias_balanced"}, "capacity factor 0.3) turns away the smallest weights"),
        ({"router": "hash"}, "capacity factor 0.3) turns away the last patches"),
    ],
)
def test_a_limit_that_a_person_sets_is_the_one_that_is_told(make, pixels, arguments, words):
    view = route_image(make(**arguments), pixels, settings=Settings(capacity=0.3))
    for layer in view.layers:
        assert layer.facts.steps["kept"].endswith(f"A full expert ({words}.")
        assert not layer.kept.all()


def test_a_limit_that_has_no_meaning_is_not_told(make, pixels):
    model = make(router=["vmoe_top_k", "soft"], top_k=[2, 1])
    limited, soft = route_image(model, pixels, settings=Settings(capacity=0.3)).layers
    assert "0.3" in limited.facts.steps["kept"]
    assert soft.facts.steps == describe(model).routers[1].steps


def test_parameters_of_a_model_and_of_its_experts(make):
    model = make()
    facts = describe(model)
    assert facts.parameters == sum(weight.numel() for weight in model.net.parameters())
    experts = model.net.blocks[3].mlp.experts
    one = reference_expert(experts, 0)
    assert facts.router(3).expert_parameters == sum(weight.numel() for weight in one.parameters())
