"""The moving average of the weights: what it is, what sees it, and what a checkpoint holds."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from moevision.train.health import EmaConfig, WeightEMA
from moevision.train.processes import callback_of
from moevision.train.task import ClassificationTask
from tests.train.guarded import Epochs, Run, batches, tiny_task
from tests.train.quiet import quiet_trainer


class Weights(L.Callback):
    """Copies of the classifier's weight after every update and in every validation."""

    def __init__(self) -> None:
        self.after: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.after.append(pl_module.net.head.weight.detach().double().clone())

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.validated.append(pl_module.net.head.weight.detach().double().clone())


def test_the_average_by_hand(tmp_path):
    """Update n takes part with 1 - min(0.9, 1 - n^-0.75); the first is taken whole. Validation sees the average.

    n^-0.75 is 0.59 for the second update and 0.18 for the tenth, so the decay of 0.9 is not reached in six.
    """
    weights = Weights()
    run = Run(tmp_path, batches(6), val=batches(1), callbacks=(weights,))
    average = weights.after[0]
    for number, weight in enumerate(weights.after[1:], start=2):
        decay = min(0.9, 1 - number**-0.75)
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(weights.validated[0], average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(weights.validated[0], weights.after[-1])
    torch.testing.assert_close(run.task.net.head.weight.double(), average, rtol=1e-5, atol=1e-7)


# The resumed run has a loader that can't skip, and of the callbacks only the average.
@pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended"
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_holds_the_average_and_the_weights(tmp_path):
    """`state_dict` is the average, which every loader gets; a training that goes on begins with both."""
    saving = ModelCheckpoint(
        tmp_path / "saved", filename="{step}", every_n_train_steps=4, save_top_k=-1
    )
    weights = Weights()
    Run(tmp_path, batches(8), callbacks=(weights, saving), enable_checkpointing=True)
    file = tmp_path / "saved" / "step=4.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    assert torch.equal(
        checkpoint["current_model_state"]["net.head.weight"].double(), weights.after[3]
    )
    assert not torch.equal(checkpoint["state_dict"]["net.head.weight"].double(), weights.after[3])
    assert checkpoint["callbacks"]["WeightEMA"] == {"updates": 4}
    loaded = ClassificationTask.load_from_checkpoint(file, weights_only=True)
    assert torch.equal(loaded.net.head.weight, checkpoint["state_dict"]["net.head.weight"])
    average, start = WeightEMA(EmaConfig(decay=0.9)), Start()
    trainer = quiet_trainer(callbacks=[average, start], max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(
        tiny_task(), Epochs(batches(4), 4), Epochs(batches(1), 1), ckpt_path=file, weights_only=True
    )
    assert start.updates == 4
    for name, tensor in start.weights.items():
        assert torch.equal(tensor, checkpoint["current_model_state"]["net." + name]), name
        assert torch.equal(start.average[name], checkpoint["state_dict"]["net." + name]), name


class Start(L.Callback):
    """What a resumed training begins with."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        average = callback_of(trainer, WeightEMA)
        self.updates = average.updates
        self.weights = {name: tensor.clone() for name, tensor in pl_module.net.state_dict().items()}
        self.average = {
            name: tensor.clone() for name, tensor in average.network.state_dict().items()
        }


def test_an_interrupted_validation_leaves_the_weights(tmp_path):
    """Whatever saves after an error in a validation must find the weights in the model, not their average."""
    weights = Weights()

    class Stop(L.Callback):
        def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("stop")

    task = tiny_task()
    with pytest.raises(RuntimeError, match="stop"):
        Run(tmp_path, batches(4), val=batches(1), callbacks=(weights, Stop()), task=task)
    assert torch.equal(task.net.head.weight.double(), weights.after[-1])
