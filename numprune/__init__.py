"""Numerical pruning of autoregressive transformers.

Importing this package lets `AutoModelForCausalLM.from_pretrained` load pruned checkpoints without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import numprune.llamagen  # noqa: F401 - Adds its family.
from numprune.ragged import DECODERS, FAMILIES

for _name, (_config, _model) in FAMILIES.items():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
    if _name in DECODERS:
        AutoModel.register(_config, DECODERS[_name])
