"""Where commands run a model."""

import pytest
import torch

from kvtrain.cli import main
from kvtrain.errors import UsageError
from kvtrain.inference.device import pick_device
from kvtrain.inference.load import open_model


@pytest.mark.parametrize("is_there", [False, True])
def test_a_gpu_is_taken_where_there_is_one(is_there: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    assert pick_device() == torch.device("cuda" if is_there else "cpu")


def test_a_device_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:99", "meta", ""):
        with pytest.raises(UsageError, match=r"--device auto takes what there is") as caught:
            pick_device(name)
        assert "\n" not in str(caught.value)


def test_a_model_goes_where_it_is_told():
    model, _ = open_model("kvtrain:copy", device=torch.device("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "command", [["generate", "kvtrain:copy", "--prompt", "x"], ["eval", "kvtrain:copy", "--tasks", "perplexity"]]
)
def test_commands_ask_for_it(command: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*command, "--device", "cuda:99"]) == 2
    assert "no device 'cuda:99' here (" in capsys.readouterr().err
