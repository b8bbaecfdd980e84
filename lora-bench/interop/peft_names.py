"""What PEFT makes of the file of an adapter, by names and shapes: it warns of keys that it misses, and leaves out quietly
what it does not know."""

from pathlib import Path

import peft
from safetensors.torch import load_file

# With all biases PEFT writes those inside its wrappers once more, and beside an embedding or a head the base's weight.
REPEATED = (".original_module.", ".modules_to_save.", ".base_layer.weight")


def differences(model, folder):
    """How the tensors in an adapter's folder differ from those that `model`, which loaded it, would save."""
    theirs = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    theirs = {name: list(t.shape) for name, t in theirs.items() if not any(part in name for part in REPEATED)}
    ours = {name: list(t.shape) for name, t in load_file(Path(folder, "adapter_model.safetensors")).items()}
    named = [f"PEFT misses {name}" for name in sorted(theirs.keys() - ours.keys())]
    named += [f"PEFT does not know {name}" for name in sorted(ours.keys() - theirs.keys())]
    both = sorted(ours.keys() & theirs.keys())
    return named + [f"{n} is {ours[n]}, in PEFT {theirs[n]}" for n in both if ours[n] != theirs[n]]
