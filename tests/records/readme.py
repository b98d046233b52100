"""README.md."""

from tests.records import Claim, Definition
from tests.records.analysis import ATLAS, of_layer
from tests.records.performance import TRAIN, in_lightning, moe
from tests.records.saving import STUDY, _ratios

CLAIMS = [
    Claim(
        ATLAS,
        "classes go to different experts ({value_bits:.2f} bits in block {layer})",
        lambda record: of_layer(record, 3, "class"),
    ),
    Claim(TRAIN.format("cifar10"), "runs at {twin} times the speed of its dense twin of equal FLOPs", moe),
    Claim(TRAIN.format("cifar10"), "{ratio} times the images/s of that twin in plain timm and Lightning", in_lightning),
    Claim(STUDY, "it saves {flops_saved:.0%} of the FLOPs per image", _ratios),
]

DEFINITIONS = [Definition("Apache-2.0", "the licence")]
