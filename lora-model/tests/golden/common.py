"""What the scripts that write golden files share."""

import json
import sys
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict

PINNED = {"torch": "2.15.0", "transformers": "5.23.0", "peft": "0.21.2"}


def check_versions():
    """Another version may round or break ties another way: the goldens are those of exactly these."""
    for module in (torch, transformers, peft):
        found = module.__version__.split("+")[0]
        if found != PINNED[module.__name__]:
            wanted = PINNED[module.__name__]
            sys.exit(f"{module.__name__} {found} is installed, the golden files are made with {wanted}")


def save_adapter(model, folder):
    """PEFT's folder, without what is empty in it or differs from run to run."""
    model.save_pretrained(folder)
    Path(folder, "README.md").unlink()  # an empty model card
    # PEFT keeps the targets in a set, whose order changes from run to run.
    path = Path(folder, "adapter_config.json")
    saved = json.loads(path.read_text())
    saved["target_modules"].sort()
    path.write_text(json.dumps(saved, indent=2, sort_keys=True))


def trainable(model):
    """Name in the saved file -> parameter, in the order of the file's names."""
    if isinstance(model, PeftModel):
        # PEFT leaves the adapter's own name out of the file, and the wrapper of a module that it saves whole.
        named = {n.replace(".modules_to_save.default", "").replace(".default.", "."): p
                 for n, p in model.named_parameters() if p.requires_grad}
        assert named.keys() == get_peft_model_state_dict(model).keys()
    else:
        named = dict(model.named_parameters())  # a tied head counts once, as the embedding
    return dict(sorted(named.items()))


def relative(x, reference):
    """|x - ref| / |ref| over all numbers of both together."""
    x, reference = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (x, reference))
    return ((x - reference).norm() / reference.norm()).item()
