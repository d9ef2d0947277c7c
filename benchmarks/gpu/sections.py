"""What is run on a GPU, the most telling first, and how long it may take."""

from typing import NamedTuple


class Section(NamedTuple):
    """A part that runs in a process of its own, so that no failure reaches the next.

    Attributes:
        name: On the command line and in the results.
        about: What it does.
        seconds: It may take so many.
        module: In this folder; its ``run(bench, *arguments)`` does it.
        arguments: Of that function.
    """

    name: str
    about: str
    seconds: int
    module: str
    arguments: tuple[str, ...] = ()


# Together with the starts of processes they stay under ten minutes.
SECTIONS = (
    Section(
        "kernels",
        "every kernel against its definition",
        90,
        "kernel_tests",
        (
            "test_kernels.py",
            "test_paged_attention.py",
            "test_attention_scores.py",
            "test_liger.py",
            "test_linear_attention.py",
        ),
    ),
    Section("forms", "the form that trains, and the one that serves", 60, "kernel_tests", ("test_forms.py",)),
    Section("attention", "backends of attention by mask", 100, "kernel_tests", ("test_attention.py",)),
    Section("train-small", "training steps against the plain host", 65, "training", ("0.15B",)),
    Section("decode", "decoding against DynamicCache", 85, "decoding"),
    Section("train-large", "training steps against the plain host", 75, "training", ("1.1B",)),
    Section("loss", "memory of the loss at a vocabulary of 128k", 25, "loss"),
    Section("linear-attention", "the kernels of linear attention against fla's", 45, "linear_attention"),
)
