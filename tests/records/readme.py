"""README.md."""

from tests.records import Claim, Definition
from tests.records.analysis import ATLAS, of_layer
from tests.records.performance import TRAIN, in_lightning, moe

CLAIMS = [
    Claim(
        ATLAS,
        "classes go to different experts, yes ({value_bits:.2f} bits in block {layer}; two other trainings "
        "{seeds[0]:.2f} and {seeds[1]:.2f})",
        lambda record: of_layer(record, 3, "class"),
    ),
    Claim(
        ATLAS, "clusters of the layer's input tell {kmeans_input:.2f} bits", lambda record: of_layer(record, 3, "class")
    ),
    Claim(TRAIN.format("cifar10"), "runs at {twin} times the speed of its dense twin of equal FLOPs", moe),
    Claim(TRAIN.format("cifar10"), "{ratio} times the images/s of that twin in plain timm and Lightning", in_lightning),
]

DEFINITIONS = [Definition("Apache-2.0", "the licence")]
