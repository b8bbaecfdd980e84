"""Writes the golden files of merging adapters: what PEFT's `add_weighted_adapter` makes of them.

    .venv/bin/python lora-model/tests/golden/merging.py     # the environment of make.py, which has to have run before

Everything goes to `merging/` next to this script:

    {model}_{a,b,c}/         adapters of the golden models, as PEFT saves them
    merged.safetensors       A and B of every case and module: {case}.{module}.lora_A
    cases.json               what each case merges, and how

DARE draws at random. Here PEFT draws from the masks of lora-core's `lowrank::combine`, which are functions of seed, module,
factor and place, so that both sides drop the same elements.
"""

import json
import os
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from common import PINNED, check_versions, save_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
OUT = HERE / "merging"
SEED = 11

GPT2 = {
    "a": dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"]),
    "b": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["c_attn", "attn.c_proj"]),
    "c": dict(r=2, lora_alpha=5, target_modules=["c_attn"]),
    "d": dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], rank_pattern={"c_fc": 2, "0.attn.c_attn": 1},
              alpha_pattern={"c_fc": 3}),
    "e": dict(r=2, lora_alpha=6, target_modules=["c_attn", "c_fc"], rank_pattern={"0.attn.c_attn": 1, "c_attn": 4}),
}
LLAMA2 = {
    "a": dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    "b": dict(r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"]),
    "c": dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"]),
}
MODELS = {"gpt2": (GPT2, dict(fan_in_fan_out=True)), "llama2": (LLAMA2, {})}

AB = {"a": 0.7, "b": 0.3}
ABC = {"a": 0.5, "b": 0.4, "c": -0.8}
# Model, adapters with weights, combination_type, further arguments.
CASES = [
    ("gpt2", AB, "linear", {}),
    ("gpt2", {"a": 1.0, "b": -0.6}, "linear", {}),
    ("gpt2", {"a": 0.4}, "linear", {}),
    ("gpt2", AB, "cat", {}),
    ("gpt2", ABC, "cat", {}),
    ("gpt2", AB, "svd", {}),
    ("gpt2", ABC, "svd", {}),
    ("gpt2", ABC, "svd", {"svd_rank": 2}),
    ("gpt2", ABC, "svd", {"svd_rank": 20}),
    *[("gpt2", AB, how, {"density": 0.4, **sign})
      for how in ("ties", "dare_ties") for sign in ({}, {"majority_sign_method": "frequency"})],
    ("gpt2", {"a": 0.7, "b": -1.3}, "ties", {"density": 0.3}),
    ("gpt2", {"a": 0.7, "b": 0.4}, "ties", {"density": 1.0}),
    ("gpt2", AB, "dare_linear", {"density": 0.6}),
    ("gpt2", AB, "magnitude_prune", {"density": 0.3}),
    *[("gpt2", ABC, how, {"density": 0.4, "svd_rank": 5, **sign})
      for how in ("ties_svd", "dare_ties_svd") for sign in ({}, {"majority_sign_method": "frequency"})],
    ("gpt2", ABC, "dare_linear_svd", {"density": 0.5, "svd_rank": 6}),
    ("gpt2", ABC, "magnitude_prune_svd", {"density": 0.2}),
    # Ranks by module; where they are not those of all adapters, PEFT adds up no factors.
    ("gpt2", {"d": 0.7, "e": 0.3}, "linear", {}),
    ("gpt2", {"d": 0.7, "e": -0.3}, "ties", {"density": 0.5}),
    ("gpt2", {"a": 0.5, "d": -0.8, "c": 1.2}, "cat", {}),
    ("gpt2", {"a": 0.5, "d": -0.8, "c": 1.2}, "svd", {"svd_rank": 6}),
    ("llama2", AB, "linear", {}),
    ("llama2", AB, "ties", {"density": 0.5}),
    ("llama2", ABC, "cat", {}),
    ("llama2", ABC, "svd", {"svd_rank": 3}),
    ("llama2", ABC, "dare_ties_svd", {"density": 0.7}),
]


def fnv1a(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return h


def mask(seed, module, tensor, k, shape, density):
    """The mask of adapter `k` for A (0), B (1) or the update (2) of a module."""
    own = fnv1a(struct.pack("<Q", seed) + module.encode())
    state = fnv1a(struct.pack("<QBQ", own, tensor, k))
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.arange(1, shape[0] * shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    uniform = (z >> np.uint64(11)).astype(np.float64) / 2**53
    return torch.from_numpy((uniform < density).reshape(shape)).float()


class Masks:
    """Stands in for torch.bernoulli while PEFT merges: it asks for all of A, then all of B, or for all updates."""

    def __init__(self, model, adapters, how):
        # The modules in PEFT's order, each with the adapters that it has.
        self.calls = []
        for name, module in model.base_model.model.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            own = [a for a in adapters if a in module.lora_A]
            tensors = [2] if how.endswith("_svd") else [0, 1]
            turned = how.endswith("_svd") and getattr(module, "fan_in_fan_out", False)
            self.calls += [(name, t, k, turned) for t in tensors for k in range(len(own)) if own]

    def __call__(self, p):
        module, tensor, k, turned = self.calls.pop(0)
        shape = tuple(reversed(p.shape)) if turned else tuple(p.shape)
        drawn = mask(SEED, module, tensor, k, shape, p.flatten()[0].double().item())
        return drawn.T if turned else drawn


def make_adapters(model):
    adapters, more = MODELS[model]
    for i, (name, options) in enumerate(adapters.items()):
        torch.manual_seed(20 + i)
        base = AutoModelForCausalLM.from_pretrained(f"../{model}/model")
        adapter = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options, **more))
        for key, p in adapter.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.3)
        save_adapter(adapter, f"{model}_{name}")


def merge(i, model, weights, how, options, tensors):
    names = list(weights)
    base = AutoModelForCausalLM.from_pretrained(f"../{model}/model")
    peft = PeftModel.from_pretrained(base, f"{model}_{names[0]}", adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(f"{model}_{name}", adapter_name=name)
    bernoulli, torch.bernoulli = torch.bernoulli, Masks(peft, names, how)
    try:
        peft.add_weighted_adapter(names, list(weights.values()), "merged", combination_type=how, **options)
        assert not how.startswith("dare") or not torch.bernoulli.calls, "masks are left over"
    finally:
        torch.bernoulli = bernoulli
    config = peft.peft_config["merged"]
    for name, module in peft.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "merged" in module.lora_A:
            tensors[f"{i}.{name}.lora_A"] = module.lora_A["merged"].weight.detach().contiguous().clone()
            tensors[f"{i}.{name}.lora_B"] = module.lora_B["merged"].weight.detach().contiguous().clone()
            assert module.scaling["merged"] == 1.0
    return {
        "model": model, "adapters": [[n, w] for n, w in weights.items()], "how": how, "seed": SEED,
        "density": options.get("density"), "sign": options.get("majority_sign_method", "total"),
        "svd_rank": options.get("svd_rank"), "r": config.r, "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
    }


def main():
    check_versions()
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    os.chdir(OUT)
    for model in MODELS:
        make_adapters(model)
    tensors = {}
    cases = [merge(i, *case, tensors) for i, case in enumerate(CASES)]
    save_file(tensors, "merged.safetensors", metadata={"format": "pt"})
    Path("cases.json").write_text(json.dumps({"versions": PINNED, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    main()
