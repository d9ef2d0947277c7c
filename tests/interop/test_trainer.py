"""transformers' ``Trainer`` around a retrofitted model: the loss and the gradients of the plain host."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import kvtrain
from tests.hosts import make_host, random_ids

pytestmark = pytest.mark.roads


class Rows(Dataset):
    """Eight rows of which some labels count."""

    def __init__(self):
        self.ids = random_ids(8, 16)
        self.labels = self.ids.clone()
        for row in range(8):
            self.labels[row, : 2 * (row % 4)] = -100  # micro-batches of unequal weight

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Gradients(TrainerCallback):
    """What the optimizer is about to see."""

    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model, folder, batch_size, accumulation, **options):
    """One optimizer step over all eight rows: its logged loss and its gradients."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    watch = Gradients()
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[watch])
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), watch.seen


@pytest.mark.parametrize("method", [kvtrain.Full(), kvtrain.DMC(), kvtrain.Duo(sink=2, recent=4)], ids=lambda m: m.name)
def test_accumulation_is_one_large_batch(method, tmp_path):
    model = kvtrain.retrofit(make_host(dtype=torch.float32), method)
    whole_loss, whole = train(model, tmp_path, 8, 1)
    parts_loss, parts = train(model, tmp_path, 2, 4)
    assert parts_loss == pytest.approx(whole_loss, abs=1e-4)  # it is logged with four digits
    largest = max(gradient.abs().max() for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6 * max(1.0, largest.item()), rtol=0)


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "smoothed"])
def test_the_loss_is_the_hosts(options, tmp_path):
    """Smoothed labels are shifted only for classes that transformers knows."""
    host = make_host(dtype=torch.float32)
    expected_loss, expected = train(host, tmp_path, 4, 2, **options)
    loss, found = train(kvtrain.retrofit(host, kvtrain.Full()), tmp_path, 4, 2, **options)
    assert loss == pytest.approx(expected_loss, abs=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
