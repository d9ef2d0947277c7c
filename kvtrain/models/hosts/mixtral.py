"""Mixtral: Mistral with experts in all layers."""

from transformers import PreTrainedConfig

from kvtrain.models.hosts.experts import ExpertsAdapter


class MixtralAdapter(ExpertsAdapter):
    """See ``HostAdapter``."""

    model_type = "mixtral"
    stored_mlp = "block_sparse_moe"
    stored_projections = ("w1", "w3", "w2")

    def validate(self, config: PreTrainedConfig) -> None:
        """See ``HostAdapter``."""
        super().validate(config)
        if config.router_jitter_noise:
            raise ValueError("noise on what routers read is not supported; set router_jitter_noise=0.0")


ADAPTER = MixtralAdapter()
