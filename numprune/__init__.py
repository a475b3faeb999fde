"""Numerical pruning of autoregressive transformers.

Importing this package lets `AutoModelForCausalLM.from_pretrained` load pruned checkpoints without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModelForCausalLM

import numprune.llamagen  # noqa: F401 - Adds its family.
from numprune.ragged import FAMILIES

for _config, _model in FAMILIES.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
