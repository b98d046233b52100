"""What a user is told about a layer or router that can't be made or run: the option, its value and the way on."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from moevision import UserError
from moevision.layers import (
    ROUTERS,
    MoEMlp,
    RouterOptions,
    build_router,
)
from moevision.models import convert_to_moe

BY_IMAGE = ("noisy_top_k", "vmoe_top_k", "switch", "sigmoid", "bias_balanced", "cosine")
HANDMADE = ("hash", "random", "position", "colour")
Row = tuple[Callable[[], Any], list[str]]


def layer(width: int = 8, hidden: int = 8, *, dtype: torch.dtype | None = None, **options: Any) -> MoEMlp:  # fmt: skip
    return MoEMlp(width, hidden, dtype=dtype, **{"num_experts": 4, **options})


def run(moe: MoEMlp) -> torch.Tensor:
    width = moe.experts.fc1.in_features
    out: torch.Tensor = moe(torch.randn(1, 3, width, dtype=moe.experts.fc1.weight.dtype))
    return out


def unused(router: str, *names: str, **options: Any) -> Row:
    return lambda: layer(router=router, **options), [f"'{router}'", *names, "leave it out"]


ROWS: dict[str, Row] = {
    "norm": (lambda: layer(norm_layer=nn.LayerNorm), ["norm_layer", "leave them out"]),
    "convolution": (lambda: layer(use_conv=True), ["use_conv", "leave them out"]),
    "backend": (lambda: layer(backend="fast"), ["'fast'", "auto, loop, grouped, dense"]),
    "unknown router": (lambda: build_router("top2", 8, 4, 2), ["'top2'", "noisy_top_k, vmoe_top_k"]),
    "more than E": (lambda: build_router("vmoe_top_k", 8, 4, 5), ["top_k=5", "num_experts=4", "1 and 4"]),
    "no expert": (lambda: build_router("vmoe_top_k", 8, 4, 0), ["top_k=0", "num_experts=4", "1 and 4"]),
    "each expert chooses more": (
        lambda: build_router("expert_choice", 8, 4, 5),
        ["top_k=5", "num_experts=4", "1 and 4"],
    ),
    "two of switch": (lambda: layer(router="switch", top_k=2), ["'switch'", "top_k=2", "must be 1"]),
    "colour of no image": (lambda: run(layer(router="colour")), ["'colour'", "image", "timm ViT"]),
    "unit": (lambda: RouterOptions(route_by="patch"), ["'patch'", "token, image"]),
    "group": (
        lambda: layer(capacity_factor=1.0, capacity_group="class"),
        ["capacity_group", "'class'", "image, batch"],
    ),
    "noise": (lambda: layer(router="vmoe_top_k", noise="loud"), ["'loud'", "learned, fixed"]),
    "capacity": (lambda: layer(capacity_factor=0.0), ["capacity_factor is 0.0", "above 0"]),
    "learned noise of cosine": (
        lambda: layer(router="cosine", noise="learned"),
        ["'cosine'", "'fixed'", "'none'"],
    ),
    "jitter of experts": (
        lambda: layer(router="expert_choice", noise="jitter"),
        ["'expert_choice'", "'fixed'", "'none'"],
    ),
    "gates of a rule": unused("hash", "normalize_gates", normalize_gates=True),
    "noise of a rule": unused("random", "noise", noise="none"),
    "bias of softmax": unused("vmoe_top_k", "bias_rate", bias_rate=1e-3),
    "slots of switch": unused("switch", "slots_per_expert", slots_per_expert=1),
}  # fmt: skip
ROWS |= {
    f"no option {wrong}": (
        lambda wrong=wrong: layer(**{wrong: 1}),
        [f"no option '{wrong}'", f"use {right}"],
    )
    for wrong, right in {
        "topk": "top_k.",
        "num_expert": "num_experts or",
        "capacity_factr": "capacity_factor or",
        "balance": "noise or route_by or",  # like nothing: all of them
    }.items()
}
ROWS["no experts"] = (lambda: layer(num_experts=0), ["num_experts is 0", "at least 1"])
ROWS["a model's layer"] = (
    lambda: convert_to_moe(timm.create_model("test_vit"), num_expert=4),
    ["no option 'num_expert'", "use num_experts or"],
)
ROWS |= {
    f"{router} by image": unused(router, "route_by", route_by="image")
    for router in ROUTERS
    if router not in BY_IMAGE
}
ROWS |= {
    f"{name} by image": (
        lambda name=name: RouterOptions(route_by="image", **{name: 1.25}),
        ["route_by='image'", "capacity_group='batch'"],
    )
    for name in ("capacity_factor", "eval_capacity_factor")
}
ROWS |= {
    f"{top_k} of {router}": (
        lambda router=router, top_k=top_k: layer(router=router, top_k=top_k),
        [f"top_k={top_k}", "num_experts=4"],
    )
    for router in HANDMADE
    for top_k in (0, 5)
}


@pytest.mark.parametrize(("call", "names"), ROWS.values(), ids=ROWS)
def test_the_sentence_names(call, names):
    with pytest.raises(UserError) as caught:
        call()
    sentence = str(caught.value)
    assert [name for name in names if name not in sentence] == [], sentence
