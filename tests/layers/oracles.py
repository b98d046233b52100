"""Every router and the layer's output as their sources define them, in float64 NumPy and plain loops.

An independent transcription: nothing here imports moevision, and nothing is written for speed. It is the evaluation
mode (no noise). Tests compare the layer's output with it, and the layer's gradients with its central differences.

Sources: Switch arXiv:2101.03961 eq. 1-2; V-MoE arXiv:2106.05974 §2; Shazeer arXiv:1701.06538 eq. 3-5; DeepSeek-V3
arXiv:2412.19437 §2.1.2 and arXiv:2408.15664 algorithm 1; X-MoE arXiv:2204.09179 and Tutel's cosine gate; expert choice
arXiv:2202.09368 §3; Soft MoE arXiv:2308.00951 §2; capacity and batch priority V-MoE §2 and §4, and its released code.

Axes: B images, N tokens, D width, H hidden width, E experts, K choices, C tokens of an expert, P slots of an expert.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Params = dict[str, Array]


class Choice(NamedTuple):
    """Token choice: index, weight and kept [B, N, K], best first."""

    index: Array
    weight: Array
    kept: Array


class Taken(NamedTuple):
    """Expert choice: token_index and weight [B, E, C], best first."""

    token_index: Array
    weight: Array


class Slots(NamedTuple):
    """Soft MoE: dispatch (what a slot reads) and combine (what a token takes) [B, N, E, P]."""

    dispatch: Array
    combine: Array


def softmax(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    exps = np.exp(x - x.max(axis=axis, keepdims=True))
    return exps / exps.sum(axis=axis, keepdims=True)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """x Φ(x), the exact form that timm's Mlp uses."""
    return np.array(
        [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.ravel()]
    ).reshape(x.shape)


def top_k(scores: Array, k: int) -> Array:
    """Indices of the k largest of the last axis, best first; of equal ones the earlier."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def choose(scores: Array, gates: Array, k: int, *, normalise: bool) -> Choice:
    """Each token takes the k experts of the best `scores`, weighted by `gates`; a single choice is never normalised."""
    index = top_k(scores, k)
    weight = np.take_along_axis(gates, index, -1)
    if normalise and k > 1:
        weight = weight / weight.sum(-1, keepdims=True)
    return Choice(index, weight, np.ones(index.shape, dtype=bool))


def linear_softmax(x: Array, p: Params, k: int, *, normalise: bool) -> Choice:
    """Switch (k = 1), V-MoE (not renormalised) and Shazeer (renormalised, = softmax over the kept)."""
    gates = softmax(x @ p["router.weight"].T)
    return choose(gates, gates, k, normalise=normalise)


def sigmoid_top_k(x: Array, p: Params, k: int) -> Choice:
    """s = σ(x W); with a bias b the choice is by s + b, the weights stay s / Σ chosen s (DeepSeek-V3 §2.1.2)."""
    affinity = sigmoid(x @ p["router.weight"].T)
    return choose(affinity + p.get("router.bias", 0.0), affinity, k, normalise=True)


def cosine_top_k(x: Array, p: Params, k: int) -> Choice:
    """softmax(cos(P x + b, e_i) · min(exp(t), 100)), not renormalised (X-MoE; the clamp is Tutel's)."""
    query = x @ p["router.proj.weight"].T + p["router.proj.bias"]
    key = p["router.expert_embedding"]
    cosine = np.empty((*x.shape[:2], len(key)))
    for place in np.ndindex(*x.shape[:2]):
        for expert in range(len(key)):
            norms = np.sqrt((query[place] ** 2).sum()) * np.sqrt((key[expert] ** 2).sum())
            cosine[place][expert] = query[place] @ key[expert] / norms
    gates = softmax(cosine * min(math.exp(float(p["router.temperature"].item())), 100.0))
    return choose(gates, gates, k, normalise=False)


def expert_choice(x: Array, p: Params, k: float, *, normalise: bool = False) -> Taken:
    """Each expert takes the C = min(N, ceil(N k / E)) tokens of an image that give it the largest softmax over E."""
    gates = softmax(x @ p["router.weight"].T)
    images, tokens, experts = gates.shape
    capacity = min(tokens, math.ceil(tokens * k / experts))
    index = np.empty((images, experts, capacity), dtype=int)
    weight = np.empty((images, experts, capacity))
    for image in range(images):
        for expert in range(experts):
            index[image, expert] = top_k(gates[image, :, expert], capacity)
            weight[image, expert] = gates[image, index[image, expert], expert]
        if normalise:
            total = np.zeros(tokens)
            for place in np.ndindex(experts, capacity):
                total[index[image][place]] += weight[image][place]
            weight[image] /= total[index[image]]
    return Taken(index, weight)


def soft(x: Array, p: Params) -> Slots:
    """Soft MoE: logits = scale · <x/|x|, mu/|mu|>; softmax over tokens, and over all experts' slots."""
    mu = p["router.mu"]
    unit_x = x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    unit_mu = mu / np.sqrt((mu**2).sum(0, keepdims=True) + 1e-6)
    logits = float(p["router.scale"].item()) * np.einsum("bnd,dep->bnep", unit_x, unit_mu)
    return Slots(softmax(logits, axis=1), softmax(logits, axis=(2, 3)))


def fill(
    choice: Choice, num_experts: int, factor: float, *, group: str, sureness: Array | None = None
) -> Choice:
    """Drop what exceeds capacity: all first choices in order, then all second ones; a dropped weight is lost.

    Tokens come in their order, or with batch priority by falling `sureness` [B, N], their largest affinity before any
    normalisation: V-MoE normalises nothing, and Tutel, which can, orders by the largest of the full softmax.
    """
    images, tokens, k = choice.index.shape
    kept = np.zeros_like(choice.kept)
    places = [(image, token) for image in range(images) for token in range(tokens)]
    groups = (
        [places]
        if group == "batch"
        else [[p for p in places if p[0] == image] for image in range(images)]
    )
    for members in groups:
        capacity = math.ceil(factor * len(members) * k / num_experts)
        room = [capacity] * num_experts
        order = members if sureness is None else sorted(members, key=lambda place: -sureness[place])
        for rank in range(k):
            for place in order:
                expert = choice.index[place][rank]
                kept[place][rank] = room[expert] > 0
                room[expert] -= 1
    return choice._replace(kept=kept)


def expert(p: Params, number: int, row: Array, act: Callable[[Array], Array] = gelu) -> Array:
    """fc2 act(fc1 row) of one expert, from the packed weights [E, H, D] and [E, D, H]."""
    hidden = act(p["experts.fc1.weight"][number] @ row + p["experts.fc1.bias"][number])
    return p["experts.fc2.weight"][number] @ hidden + p["experts.fc2.bias"][number]


def shared_output(x: Array, p: Params) -> Array:
    """The dense MLP that every token passes; 0 without one."""
    if "shared.fc1.weight" not in p:
        return np.zeros_like(x)
    hidden = gelu(x @ p["shared.fc1.weight"].T + p["shared.fc1.bias"])
    return hidden @ p["shared.fc2.weight"].T + p["shared.fc2.bias"]


def layer_output(x: Array, p: Params, decision: Choice | Taken | Slots) -> Array:
    """What the MoE layer returns [B, N, D]: the weighted sum of expert outputs, row by row, and the shared expert."""
    out = shared_output(x, p)
    if isinstance(decision, Choice):
        for image, token, rank in np.ndindex(*decision.index.shape):
            if decision.kept[image, token, rank]:
                value = expert(p, decision.index[image, token, rank], x[image, token])
                out[image, token] += decision.weight[image, token, rank] * value
    elif isinstance(decision, Taken):
        for image, number, rank in np.ndindex(*decision.weight.shape):
            token = decision.token_index[image, number, rank]
            out[image, token] += decision.weight[image, number, rank] * expert(
                p, number, x[image, token]
            )
    else:
        for image, number, slot in np.ndindex(len(x), *decision.combine.shape[2:]):
            value = expert(p, number, decision.dispatch[image, :, number, slot] @ x[image])
            out[image] += np.outer(decision.combine[image, :, number, slot], value)
    return out


def central_differences(
    value: Callable[[], float], places: Sequence[Array], step: float = 1e-6
) -> list[Array]:
    """Gradient of `value` with respect to every entry of the arrays, which it reads; error about step² and 1e-10."""
    gradients = []
    for array in places:
        gradient = np.zeros(array.shape)
        for place in np.ndindex(*array.shape):
            kept = array[place]
            array[place] = kept + step
            above = value()
            array[place] = kept - step
            gradient[place] = (above - value()) / (2 * step)
            array[place] = kept
        gradients.append(gradient)
    return gradients
