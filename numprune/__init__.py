"""Numerical pruning of autoregressive transformers.

Importing this package lets `AutoModelForCausalLM.from_pretrained` load pruned checkpoints without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import numprune.llamagen  # noqa: F401 - Adds its family.
from numprune.multimodal import HOLDERS
from numprune.ragged import DECODERS, FAMILIES

for _name, (_config, _model) in FAMILIES.items():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
    if _name in DECODERS:
        AutoModel.register(_config, DECODERS[_name], exist_ok=True)
for _holder in HOLDERS.values():
    AutoConfig.register(_holder.ragged.config_class.model_type, _holder.ragged.config_class)
    AutoModelForImageTextToText.register(_holder.ragged.config_class, _holder.ragged)
