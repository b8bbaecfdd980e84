"""Checks that loralib, AdapterHub and PEFT read what `lora convert` and `lora merge` write.

    .adapters/bin/python lora-bench/interop/check_foreign.py target/release/lora     # the environment of golden/foreign.py
    .venv/bin/python lora-bench/interop/check_foreign.py target/release/lora --peft  # the environment of golden/make.py

Golden adapters of each program go through this project's format and back; the program loads the result and has to compute
the logits that it computed with the original. With --peft every merged adapter of golden/merging.py is loaded by PEFT, which
has to know every tensor of it and to miss none, and computes what its own merged adapter computes.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

GOLDEN = Path(__file__).resolve().parents[2] / "lora-model/tests/golden"
LORA = Path(sys.argv[1]).resolve()
MOST = 1e-5


def lora(*args):
    subprocess.run([LORA, "--quiet", *map(str, args)], check=True)


def logits(model, ids):
    with torch.no_grad():
        return model.double().eval()(torch.tensor([ids])).logits[0]


def compare(name, found, wanted):
    off = ((found - wanted.double()).norm() / wanted.double().norm()).item()
    print(f"{name:40} {off:.1e}")
    assert off < MOST, f"{name} is off by {off}"


def filled(m, like):
    """`m` in the upper left of zeros."""
    whole = torch.zeros(like.shape, dtype=m.dtype)
    whole[:m.shape[0], :m.shape[1]] = m
    return whole


def loralib(work, about, golden):
    import loralib

    sys.path.insert(0, str(GOLDEN))
    from foreign import replaced

    for name, case in about["loralib"].items():
        base = GOLDEN / case["model"] / "model"
        enable = case["enable_lora"]
        parts = ["--parts", ",".join(p for p, on in zip("qkv", enable) if on)] if enable else []
        lora("convert", GOLDEN / f"foreign/loralib/{name}.pt", "--from", "loralib", "--model", base, "--alpha",
             case["lora_alpha"], *parts, "--out", work / name)
        lora("convert", work / name, "--to", "loralib", "--model", base, "--out", work / f"{name}.pt")
        model = AutoModelForCausalLM.from_pretrained(base)
        options = dict(r=case["r"], lora_alpha=case["lora_alpha"])
        if enable:
            width = model.config.n_embd
            replaced(model, "c_attn", lambda m: loralib.MergedLinear(width, 3 * width, enable_lora=enable,
                                                                     fan_in_fan_out=True, **options))
        else:
            for target in ("q_proj", "v_proj", "down_proj"):
                replaced(model, target, lambda m: loralib.Linear(m.in_features, m.out_features, bias=False, **options))
        loaded = model.load_state_dict(torch.load(work / f"{name}.pt", weights_only=True), strict=False)
        assert not loaded.unexpected_keys and not [k for k in loaded.missing_keys if "lora_" in k], loaded
        compare(f"loralib {name}", logits(model, about["ids"]), golden[f"loralib.{name}"])


def adapterhub(work, about, golden):
    import adapters

    for name, case in about["adapterhub"].items():
        base = GOLDEN / case["model"] / "model"
        lora("convert", GOLDEN / "foreign/adapterhub" / name, "--from", "adapterhub", "--model", base, "--out", work / name)
        lora("convert", work / name, "--to", "adapterhub", "--model", base, "--name", "mine", "--out", work / f"{name}-back")
        cls = AutoModelForMaskedLM if "masked" in case["model"] else AutoModelForCausalLM
        model = cls.from_pretrained(base, attn_implementation="eager")
        adapters.init(model)
        loaded = model.load_adapter(str(work / f"{name}-back"), with_head=False, set_active=True)
        assert loaded == "mine"
        compare(f"AdapterHub {name}", logits(model, about["ids"]), golden[f"adapterhub.{name}"])


def peft(work):
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from peft_names import differences

    merging = GOLDEN / "merging"
    tensors = load_file(merging / "merged.safetensors")
    ids = [5, 17, 9, 3, 42, 8, 8, 31]
    for i, case in enumerate(json.loads((merging / "cases.json").read_text())["cases"]):
        base = GOLDEN / case["model"] / "model"
        adapters = ",".join(f"{merging / (case['model'] + '_' + n)}:{w}" for n, w in case["adapters"])
        options = [f"--{flag}={case[key]}" for flag, key in (("density", "density"), ("svd-rank", "svd_rank")) if case[key]]
        if case["sign"] == "frequency":
            options.append("--majority-sign=frequency")
        lora("merge", "--adapters", adapters, "--how", case["how"], "--seed", case["seed"], *options, "--out", work / str(i))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), work / str(i))
        said = [str(w.message) for w in said if "key" in str(w.message)] + differences(ours, work / str(i))
        assert not said, said
        found = logits(ours, ids)
        theirs = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{i}.")}
        held = get_peft_model_state_dict(ours)
        # What has a lower rank by `rank_pattern` keeps it when PEFT merges, which its own file of the result could not say.
        state = {f"base_model.model.{k}.weight": v for k, v in theirs.items()}
        state = {k: filled(v, held[k]) for k, v in state.items()}
        # In double after loading, as ours was.
        result = set_peft_model_state_dict(ours, state)
        assert not result.unexpected_keys
        compare(f"PEFT {i} {case['model']} {case['how']}", found, logits(ours, ids))


def main():
    transformers.utils.logging.set_verbosity_error()
    about = json.loads((GOLDEN / "foreign/foreign.json").read_text())
    golden = load_file(GOLDEN / "foreign/logits.safetensors")
    with tempfile.TemporaryDirectory() as work:
        if "--peft" in sys.argv:
            peft(Path(work))
        else:
            warnings.filterwarnings("ignore")
            loralib(Path(work), about, golden)
            adapterhub(Path(work), about, golden)


if __name__ == "__main__":
    main()
