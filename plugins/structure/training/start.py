"""Write the weights from which the structure template's training starts: `python start.py FILE`.

They are the base's own, but for values of zero. The base has never seen an outline: with its own values it would be
misled so badly that the first thing learned is to turn the keys away, after which nothing else is.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from silkscreen import load_base
from silkscreen.architectures.dit import from_transformer

transformer = load_base("flux2-tiny").transformer
weights = from_transformer(transformer.state_dict())
dim = transformer.inner_dim
for name, value in weights.items():
    if "to_qkv" in name:
        weights[name] = torch.cat([value[: 2 * dim], torch.zeros_like(value[2 * dim : 3 * dim]), value[3 * dim :]])
save_file(weights, sys.argv[1])
