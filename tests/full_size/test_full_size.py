"""FLUX.2-klein-base-4B with two templates at full size, in random weights, on a CPU: `nox -s full_size`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from write_base import BASE_ID, write_base, write_templates

FOLDER = os.environ.get("SILKSCREEN_FULL_SIZE")

PROGRAM = """
import json, re, sys, time
from pathlib import Path
from PIL import Image
from silkscreen import TemplatePipeline, load_base

folder, start = Path(sys.argv[1]), time.monotonic()
pipe = load_base(folder / "klein-base-4B", offload="disk")
loaded = time.monotonic()
templates = TemplatePipeline([folder / "brightness", folder / "structure"], trust_code=True)
picture = templates(
    pipe, prompt="a large red circle on a blue background", seed=0, num_inference_steps=2, height=256, width=256,
    template_inputs=[
        {"model_id": "brightness", "scale": 0.8},
        {"model_id": "structure", "image": Image.open(folder / "outline.png"), "prompt": "a large red circle"},
    ],
    negative_template_inputs=[{"model_id": "brightness", "scale": 0.5}],
).images[0]
picture.save(folder / "picture.png")
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({
    "base": pipe._silkscreen_base.id, "dtype": str(pipe.transformer.dtype), "peak_gigabytes": peak * 1024 / 1e9,
    "seconds_loading": loaded - start, "seconds_drawing": time.monotonic() - loaded,
}))
"""


@pytest.mark.skipif(FOLDER is None, reason="takes 10 to 35 minutes and 26 GB of disk: nox -s full_size")
def test_the_4b_base_draws_with_two_templates_on_a_cpu_within_24_gigabytes() -> None:
    folder = Path(str(FOLDER))
    if not (folder / "klein-base-4B").is_dir():
        write_base(folder / "klein-base-4B")
        write_templates(folder)
    Image.open(Path(__file__).parents[2] / "core/docs/outline.png").convert("RGB").resize((256, 256)).save(
        folder / "outline.png"
    )
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{json.dumps(found, indent=2)}")
    assert (found["base"], found["dtype"]) == (BASE_ID, "torch.float32")
    assert found["peak_gigabytes"] < 24
    with Image.open(folder / "picture.png") as picture:
        assert picture.size == (256, 256)
        assert picture.convert("L").getextrema()[0] < picture.convert("L").getextrema()[1]
