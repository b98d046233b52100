"""Models that aren't ours, each with one MoE block and its hook, for `moevision audit`.

All take 32 px images as 16 patches. `sparse` has the block of transformers' Mixtral, `soft` weighs all experts, `whole`
routes an image by the mean of its patches, as ES-MoE does. Trained for a second on drawn cats and dogs, unlike those of
`tests.shared.draw_folder`, which are drawn by another seed.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moevision.analysis import Audited, Choices
from moevision.data import SyntheticPets
from moevision.models.io import SavedModel

CLASSES = ["cat", "dog"]
WIDTH, EXPERTS = 24, 4
HALF = (0.5, 0.5, 0.5)


class Net(nn.Module):
    """Patches, one MoE block beside a residual connection, and a head on their mean."""

    def __init__(self, block):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.block = block
        self.head = nn.Linear(WIDTH, len(CLASSES))

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT.contiguous()  # [B, 16, D]
        return self.head((tokens + self.block(tokens)).mean(1))


class Linears(nn.Module):
    """Experts that are one matrix each, and a gate on tokens, or on their mean; it stores what it did."""

    def __init__(self, by_image):
        super().__init__()
        self.by_image = by_image
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)
        self.forced = None

    def forward(self, tokens):
        read = tokens.mean(1, keepdim=True) if self.by_image else tokens
        gates = self.gate(read).softmax(-1)  # [B, T, E]
        order = gates.argsort(-1, descending=True)
        if self.by_image:  # one expert, unless it is negative
            order = order[..., :1] if self.forced is None else self.forced
            gates = (
                F.one_hot(order.clamp(min=0), EXPERTS)
                * gates[..., None, :]
                * (order >= 0)[..., None]
            )
            gates = gates.sum(-2)
        self.seen = Choices(
            order, EXPERTS, None if self.by_image else gates.gather(-1, order), read
        )
        outputs = torch.einsum("btd,edf->btef", tokens, self.experts)
        return (outputs * gates[..., None]).sum(2)


def sparse_block():
    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    for weight in block.parameters():  # which are empty
        nn.init.normal_(weight, std=0.3)
    return block


@cache
def load_net(make_block=sparse_block, steps=300):
    """A trained net and an untrained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, untrained = Net(make_block()), Net(make_block())
        pets = SyntheticPets(4800, 32, 1, "train")
        kept = [index for index in range(4800) if pets.classes[pets.label(index)] in CLASSES]
        labels = torch.tensor([CLASSES.index(pets.classes[pets.label(i)]) for i in kept])
        images = np.stack([np.asarray(pets[index][0]) for index in kept])
        images = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
        for _ in range(steps):
            batch = torch.randint(len(images), (32,))
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    return net.eval(), untrained.eval()


def saved(net):
    return SavedModel(net, CLASSES, 32, HALF, HALF)


def stored(net, images, forced=None):
    """The hook of `Linears`."""
    net.block.forced = None if forced is None else forced[0]
    logits = net(images)
    net.block.forced = None
    return logits, [net.block.seen]


def unforced(net, images):
    return stored(net, images)


def soft():
    net, untrained = load_net(lambda: Linears(by_image=False))
    return Audited(saved(net), unforced, untrained)


def whole():
    net, _ = load_net(lambda: Linears(by_image=True))
    return Audited(saved(net), stored)


def sparse():
    """Without the hook's forcing; the guide's has it."""
    net, untrained = load_net()

    def listened(net, images):
        seen = []
        handle = net.block.gate.register_forward_hook(lambda *call: seen.append(call))
        logits = net(images)
        handle.remove()
        ((_, (inputs,), (_, weights, experts)),) = seen
        seen = (part.unflatten(0, (len(images), -1)) for part in (experts, weights, inputs))
        experts, weights, inputs = seen
        return logits, [Choices(experts, EXPERTS, weights, inputs)]

    return Audited(saved(net), listened, untrained)
