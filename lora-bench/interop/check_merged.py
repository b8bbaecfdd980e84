"""Does a model merged by `lora merge` load in Transformers, and does it compute what PEFT does with base and adapter?

    python lora-bench/interop/check_merged.py --base DIR --adapter DIR --merged DIR [--ids 15496,995] [--tolerance 1e-5]

Needs torch, transformers and peft. Prints one JSON object: the difference between the logits of the merged model and
those of base + adapter, relative (|merged - ref| / |ref|) and the largest of any single logit, and under `problems`
every tensor that one of the three folders has too few or too many of. Exit status 1 if there is a problem or the
relative difference is above the tolerance.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# All three folders are local: PEFT would otherwise look on the hub for the base that the adapter's config names.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    problems = []
    reference = with_adapter(load(args.base, problems), args.adapter, problems)
    merged = load(args.merged, problems)
    config = merged.config
    if args.ids is None:
        length = min(args.tokens, config.max_position_embeddings)
        ids = torch.randint(config.vocab_size, (1, length))
    else:
        ids = torch.tensor([args.ids])
    with torch.no_grad():
        x, ref = merged(ids).logits.double(), reference(ids).logits.double()
    relative = ((x - ref).norm() / ref.norm()).item()
    print(json.dumps({"relative_difference": relative, "max_difference": (x - ref).abs().max().item(),
                      "tokens": ids.shape[1], "tolerance": args.tolerance, "problems": problems}))
    # A NaN is not below any tolerance.
    sys.exit(0 if not problems and relative <= args.tolerance else 1)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True, help="folder of the base model")
    p.add_argument("--adapter", required=True, help="folder of the PEFT adapter")
    p.add_argument("--merged", required=True, help="folder of the merged model")
    p.add_argument("--ids", type=lambda s: [int(i) for i in s.split(",")], help="token ids, with commas; default: random")
    p.add_argument("--tokens", type=int, default=64, help="how many random ids")
    p.add_argument("--seed", type=int, default=0, help="of the random ids")
    p.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference that passes")
    return p.parse_args()


def load(folder, problems):
    """The model in f32. Transformers would fill a missing tensor with random numbers and only warn."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    for what, found in info.items():
        problems += [f"{folder}: {what}: {entry}" for entry in sorted(map(str, found or []))]
    return model.eval()


def with_adapter(model, folder, problems):
    """The model with the adapter attached. PEFT skips what does not match, so the names are compared here."""
    model = PeftModel.from_pretrained(model, folder)
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        saved = {name: file.get_slice(name).get_shape() for name in file.keys()}
    wanted = {name: list(t.shape) for name, t in get_peft_model_state_dict(model).items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            problems.append(f"{folder}: {name}: saved {saved.get(name)}, wanted {wanted.get(name)}")
    return model.eval()


if __name__ == "__main__":
    main()
