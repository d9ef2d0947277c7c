"""Lets transformers open this folder with ``trust_remote_code=True``; the model's code is in the package kvtrain."""

try:
    from kvtrain.models.auto import class_by_name
except ModuleNotFoundError as error:
    if error.name != "kvtrain":
        raise
    raise ImportError("this model needs kvtrain; run `pip install kvtrain` and open it again") from None

__getattr__ = class_by_name  # the classes that `auto_map` in config.json names
