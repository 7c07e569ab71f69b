"""Write the weights from which the structure template's training starts: `python start.py FILE`.

They are the base's own, but for values of zero.
"""

from __future__ import annotations

import sys

from safetensors.torch import save_file
from silkscreen import load_base
from silkscreen.architectures.dit import starting_weights

save_file(starting_weights(load_base("flux2-tiny").transformer), sys.argv[1])
