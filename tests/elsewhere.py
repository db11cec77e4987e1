"""Loading what was published in a process that has transformers and no ShortZip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from hub_server import WRITER, Hub
from PIL import Image

PROMPT = "USER: <image>\nname the colour ASSISTANT:"
_LOAD = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path = [path for path in sys.path if "__editable__" not in path]
import importlib.util
ours = ("shortzip", "reduction", "train", "data")
assert not [name for name in ours if importlib.util.find_spec(name)], "ShortZip can be imported here"
import torch
from PIL import Image
torch.set_num_threads(1)
card, image, prompt, out = sys.argv[1:]
lines = open(card).read().split("```python\\n")[1].split("\\n```")[0]
assert len(lines.splitlines()) == 3
exec(lines)
inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, out)
assert not set(ours) & {name.partition(".")[0] for name in sys.modules}
"""


def picture() -> Image.Image:
    return Image.new("RGB", (40, 30), (200, 40, 90))


def environment(hub: Hub, home: Path, token: str | None = WRITER) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1", **hub.environment(home, token)}


def logits_from_hub(hub: Hub, name: str, home: Path, work: Path) -> torch.Tensor:
    """Runs the card's three lines with an empty cache; gives the logits of `PROMPT` about `picture()`."""
    work.mkdir()
    (work / "README.md").write_bytes(hub.files(name)["README.md"])
    picture().save(work / "image.png")
    arguments = [str(work / "README.md"), str(work / "image.png"), PROMPT, str(work / "logits.pt")]
    command = [sys.executable, "-P", "-c", _LOAD, *arguments]
    variables = environment(hub, home, None)
    run = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return torch.load(work / "logits.pt", weights_only=True)
