"""What a model card says about how to use the model: a program that runs as it stands, and commands."""

from __future__ import annotations

import json

from moevision.train.card_facts import CardFacts

_USAGE = """\
## How to use it

With `moevision` installed, which brings timm and torch:

```python
import timm
import torch
from PIL import Image

import moevision  # tells timm the names of its models

model = timm.create_model({address}, pretrained=True).eval()
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
pixels = prepare(Image.open({quoted_picture}).convert("RGB"))[None]
with torch.inference_mode():
    probabilities = model(pixels).softmax(-1)[0]
names = model.pretrained_cfg.get("label_names") or range(model.num_classes)
for probability, index in zip(*probabilities.topk({top}), strict=True):
    print(f"{{names[index]}}: {{probability:.1%}}")
{routing}```

{where}On the command line:

    moevision predict {command_address} {picture}
    moevision info {command_address}
"""
_ROUTING = """\

with torch.inference_mode():
    logits, routings = moevision.forward_routing(model, pixels)
for routing in routings:  # one per MoE layer: which weight each patch gives each expert
    print(routing.layer, routing.grid, routing.expert_weights().shape)
"""


def usage_section(facts: CardFacts, picture: str = "picture.jpg") -> str:
    """A program that classifies `picture` and shows where its patches go, and the commands that do."""
    here = facts.address == "local-dir:."
    return _USAGE.format(
        address=json.dumps(facts.address),
        quoted_picture=json.dumps(picture),
        command_address="." if here else facts.address,
        where="`local-dir:.` is the folder that this file lies in: start there. " if here else "",
        picture=picture,
        top=min(5, len(facts.class_names)),
        routing=_ROUTING if facts.blocks else "",
    )
