"""Plugin for vLLM: pruned checkpoints load without `--trust-remote-code`, where numprune is installed.

vLLM has a backend that runs models of transformers with its own attention, linear layers and key/value cache, and that
reads head counts for every layer. Importing numprune makes the configurations and decoders known to transformers; what
is left to say is that their architectures go to that backend.
"""

from numprune.ragged import DECODERS, FAMILIES

_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Registers the architectures of all families; vLLM calls it in each of its processes."""
    from vllm import ModelRegistry

    for name in DECODERS:
        ModelRegistry.register_model(FAMILIES[name][1].__name__, _BACKEND)
