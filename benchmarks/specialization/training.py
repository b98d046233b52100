"""One run of the study: an arm is upcycled from the trunk, trained on its tokens, and asked the three questions.

Axes: I images, N tokens, P patches, D width, E experts, R images that are run again, C classes, G groups of classes.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.harness import HERE, about
from benchmarks.specialization.arms import ARMS, DATA_SETS, Arm, Job
from benchmarks.specialization.trunk import Tail, Tokens, class_names, tokens_of, trunk_of
from benchmarks.subject import Subject, TrainingStep
from benchmarks.timing import rounded
from moevision.analysis.questions import three_questions
from moevision.analysis.readings import Assignments, RecordedLayer, Recording, Run, forced_logits
from moevision.files import file_sha256
from moevision.layers import MoEMlp, forward_routing, moe_layers
from moevision.models.convert import moe_layer_indices
from moevision.models.upcycle import upcycle

PROTOCOL = HERE / "specialization" / "protocol.md"
ASKED_LAYERS = 2  # the last ones, which `last2` and `every2` have in common
SWAP_IMAGES, SWAP_DRAWS = 200, 2
ROUTES = 4096  # choices that a record keeps of a layer, for matching experts between seeds
_BATCH = 64
Ints = npt.NDArray[np.integer[Any]]


class Seen(NamedTuple):
    """What a model made of images.

    Attributes:
        choices: for each MoE layer [I, P, 1] the expert of each patch, P = 1 where images are routed.
        router_inputs: for each asked layer [I, P, D].
        block_inputs: for each asked layer [I, N, D], what its block receives.
        logits: [I, C].
    """

    choices: list[Ints]
    router_inputs: list[npt.NDArray[np.float32]]
    block_inputs: list[Tensor]
    logits: npt.NDArray[np.float32]


def run(job: Job, options: Namespace) -> dict[str, Any]:
    """Do one run; its record."""
    origin = {**about(), "command": "python -m benchmarks specialization run"}  # without this machine's folders
    spec, arm = DATA_SETS[job.data], ARMS[job.arm]
    trunk = trunk_of(job.data, job.trunk_seed, options)
    blocks = moe_layer_indices(arm.layers, spec.depth)
    train, asked = (tokens_of(job.data, split, blocks[0], trunk, options) for split in ("train", job.split))
    start = time.process_time()
    net = upcycled(trunk.net, arm, spec.experts, job.seed)
    before = look(net, blocks[0], asked.tokens)
    fit(net, blocks[0], train, arm, job)
    trained = time.process_time()
    after = look(net, blocks[0], asked.tokens)
    names, labels = class_names(job.data, options), asked.labels.numpy()
    found = {
        unit: [without_words(layer.to_json()) for layer in answers(net, arm, before, after, labels, names, groups)]
        for unit, groups in spec.units.items()
    }
    return {
        **vars(job), "trunk": {key: trunk.record.get(key) for key in ("sha256", "given", "seed", "top1", "cpu_s")},
        "steps": spec.steps, "images": len(asked.labels), "experts": spec.experts,
        "top1_before": _top1(before, labels), "top1": _top1(after, labels),
        "loads": {f"L{block}": _load(each, spec.experts) for block, each in zip(blocks, after.choices, strict=True)},
        "classes": {unit: list(groups) or names for unit, groups in spec.units.items()},
        "answers": rounded_all(found), "routes": [_routes(choices) for choices in after.choices[-ASKED_LAYERS:]],
        "cpu_s": {"training": round(trained - start, 1), "asking": round(time.process_time() - trained, 1)},
        "protocol_sha256": file_sha256(PROTOCOL), **origin,
    }  # fmt: skip


def upcycled(dense: nn.Module, arm: Arm, experts: int, seed: int) -> nn.Module:
    """The trunk as a Mixture of Experts: every expert a copy of the MLP, one per token or image."""
    options = {"route_by": arm.unit, **arm.options}
    return upcycle(
        dense, layers=arm.layers, num_experts=experts, top_k=1, router=arm.router, seed=seed, **options
    ).eval()


def fit(net: nn.Module, first: int, train: Tokens, arm: Arm, job: Job) -> None:
    """Train the blocks from `first` on, in place: every copy once, in the order of the seed."""
    spec = DATA_SETS[job.data]
    subject = Subject(job.name, {}, spec.optim, arm.aux, batch_size=spec.batch)
    tail = Tail(net, first)
    torch.manual_seed(job.seed)
    step = TrainingStep(subject, precision=spec.precision, net=tail, total_steps=spec.steps)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(job.seed))
    for chosen in order[: spec.steps * spec.batch].split(spec.batch):
        step(train.tokens[chosen].float(), train.labels[chosen])
    net.eval()


@torch.inference_mode()
def look(net: nn.Module, first: int, tokens: Tensor) -> Seen:
    """Run the blocks from `first` on over tokens [I, N, D]; `net` is in eval mode."""
    tail = Tail(net, first).eval()
    layers = moe_layers(net)
    asked = layers[-ASKED_LAYERS:]
    received: list[list[Tensor]] = [[] for _ in range(2 * len(asked))]

    def keep(place: int, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        received[place].append(inputs[0])

    hooks = [
        module.register_forward_pre_hook(partial(keep, 2 * place + second))
        for place, layer in enumerate(asked)
        for second, module in enumerate((layer, _block_of(net, layer)))
    ]
    choices: list[list[Ints]] = [[] for _ in layers]
    logits = []
    try:
        for part in tokens.split(_BATCH):
            output, routings = forward_routing(tail, part.float())
            logits.append(output.float().numpy())
            for place, routing in enumerate(routings):
                one = slice(0, 1) if routing.route_by == "image" else slice(tail.num_prefix_tokens, None)
                choices[place].append(routing.expert_index[:, one].numpy().astype(np.int16))
    finally:
        for hook in hooks:
            hook.remove()
    by_image = getattr(layers[0].router.options, "route_by", None) == "image"
    joined = [torch.cat(each) for each in received]
    inputs = [x.mean(1, keepdim=True) if by_image else x[:, tail.num_prefix_tokens :] for x in joined[::2]]
    return Seen([np.concatenate(each) for each in choices], [x.numpy() for x in inputs], joined[1::2],
                np.concatenate(logits))  # fmt: skip


def answers(
    net: nn.Module, arm: Arm, before: Seen, after: Seen, labels: Ints, names: Sequence[str],
    groups: Mapping[str, Sequence[str]],
) -> list[Any]:  # fmt: skip
    """The three questions about the asked layers; of groups of classes if there are any, else of classes."""
    layers, group_of = moe_layers(net)[-ASKED_LAYERS:], np.arange(len(names))
    if groups:
        group_of = np.array([next(g for g, group in enumerate(groups.values()) if name in group) for name in names])
    recorded, run = recorded_layers(net, arm.unit, before, after), runner(net, layers, after, group_of)
    recording = Recording(group_of[labels], recorded, list(groups) or names, run=run)
    return three_questions(recording, swap_images=SWAP_IMAGES, draws=SWAP_DRAWS)


def recorded_layers(net: nn.Module, unit: str, before: Seen, after: Seen) -> list[RecordedLayer]:
    """The asked layers, which route each `token` or the `image`, before and after training."""
    return [
        RecordedLayer(
            f"L{layer.layer_index}", now, layer.router.num_experts, by_image=unit == "image", inputs=inputs,
            before=[Assignments(layer.layer_index, 0, ago, np.arange(len(ago)), layer.router.num_experts)],
        )
        for layer, now, ago, inputs in zip(
            moe_layers(net)[-ASKED_LAYERS:], after.choices[-ASKED_LAYERS:], before.choices[-ASKED_LAYERS:],
            after.router_inputs, strict=True,
        )
    ]  # fmt: skip


def runner(net: nn.Module, layers: Sequence[MoEMlp], after: Seen, group_of: Ints) -> Run:
    """Runs the model again from the block of one asked layer on, with forced routes; logits of groups [R, G]."""
    prefix, groups = int(getattr(net, "num_prefix_tokens", 0)), int(group_of.max()) + 1

    def again(place: int, images: Ints, experts: Ints) -> npt.NDArray[np.float64]:
        tail = Tail(net, int(layers[place].layer_index or 0)).eval()
        tokens = after.block_inputs[place][torch.from_numpy(images)]
        logits = np.concatenate([
            forced_logits(tail, layers[place], part, experts[start : start + _BATCH], prefix)
            for start, part in zip(range(0, len(images), _BATCH), tokens.split(_BATCH), strict=True)
        ]).astype(np.float64)  # fmt: skip
        return np.stack([np.logaddexp.reduce(logits[:, group_of == g], axis=1) for g in range(groups)], 1)

    return again


def _block_of(net: nn.Module, layer: MoEMlp) -> nn.Module:
    return next(block for block in net.blocks if layer in list(block.modules()))  # type: ignore[union-attr]


def _top1(seen: Seen, labels: Ints) -> float:
    return float((seen.logits.argmax(1) == labels).mean())


def _load(choices: Ints, experts: int) -> list[float]:
    counts = np.bincount(choices.ravel(), minlength=experts)
    return [rounded(float(share), 4) for share in counts / counts.sum()]


def _routes(choices: Ints) -> list[str]:
    """A digit for each patch, a string for each of the first images: at most about `ROUTES` in all."""
    images = max(2, ROUTES // choices.shape[1])
    return ["".join(map(str, image)) for image in choices[:images, :, 0].tolist()]


def without_words(layer: dict[str, Any]) -> dict[str, Any]:
    """Numbers that stand in words too aren't kept twice."""
    for answer in layer["answers"]:
        del answer["numbers"], answer["detail"]
    return layer


def rounded_all(value: Any) -> Any:
    """A JSON value with five digits of every number."""
    if isinstance(value, dict):
        return {name: rounded_all(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded_all(entry) for entry in value]
    return rounded(value, 5) if isinstance(value, float) else value
