"""Write the weights from which the structure template's training starts, the base's own: `python start.py FILE`."""

from __future__ import annotations

import sys

from safetensors.torch import save_file
from silkscreen import load_base
from silkscreen.architectures.dit import from_transformer

save_file(from_transformer(load_base("flux2-tiny").transformer.state_dict()), sys.argv[1])
