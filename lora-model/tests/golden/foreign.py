"""Writes the golden files of other programs' adapters: of PyTorch's own files, loralib and AdapterHub.

    python -m venv .adapters && .adapters/bin/pip install torch==2.15.0 adapters==1.3.0 transformers==4.57.6 loralib==0.1.2
    .adapters/bin/python lora-model/tests/golden/foreign.py     # after make.py and architectures.py have run

Everything goes to `foreign/` next to this script:

    torch/           state dictionaries of torch.save in both of its formats, and the tensors that they hold
    loralib/         lora.lora_state_dict of golden models
    adapterhub/      adapters as `save_adapter` writes them
    logits.safetensors, foreign.json    what the models compute with them, in f64, and how they were made
"""

import json
import os
import shutil
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import adapters
import loralib as lora
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

HERE = Path(__file__).resolve().parent
OUT = HERE / "foreign"
PINNED = {"torch": "2.15.0", "transformers": "4.57.6", "adapters": "1.3.0", "loralib": "0.1.2"}
IDS = [5, 17, 9, 3, 42, 8, 8, 31]


def check_versions():
    from importlib.metadata import version

    for name, wanted in PINNED.items():
        found = version(name).split("+")[0]
        if found != wanted:
            sys.exit(f"{name} {found} is installed, the golden files are made with {wanted}")


def torch_files():
    """The kinds of tensors that a state_dict may hold, among other things."""
    folder = OUT / "torch"
    folder.mkdir()
    torch.manual_seed(1)
    shared = torch.randn(6, 4)
    state = OrderedDict(
        f32=torch.randn(3, 5), f16=torch.randn(4).half(), bf16=torch.randn(2, 3).bfloat16(), f64=torch.randn(2, 2).double(),
        transposed=torch.randn(4, 3).T, rows=shared[2:5], columns=shared[:, 1:3], parameter=torch.nn.Parameter(torch.randn(3)),
        scalar=torch.tensor(2.5), empty=torch.zeros(0, 3), cube=torch.randn(2, 3, 4).permute(2, 0, 1),
        ids=torch.arange(5),
    )
    state._metadata = OrderedDict([("", {"version": 1})])
    torch.save(state, folder / "state.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"step": 3, "loss": 0.5, "done": False, "model_state_dict": state, "names": ["a", ("b", None)]},
               folder / "nested.pt")
    floats = {k: v.detach().float().contiguous().clone() for k, v in state.items() if v.is_floating_point()}
    save_file(floats, folder / "expected.safetensors", metadata={"format": "pt"})


def logits(model, name, tensors):
    with torch.no_grad():
        out = model.double().eval()(torch.tensor([IDS])).logits[0]
    tensors[name] = out.float().contiguous()


def replaced(model, target, make):
    """Puts modules of loralib in the place of those whose name ends in `target`."""
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] == target:
            parent = model.get_submodule(name.rsplit(".", 1)[0])
            new = make(module)
            with torch.no_grad():
                new.weight.copy_(module.weight)
                if module.bias is not None:
                    new.bias.copy_(module.bias)
            setattr(parent, target, new)


def loralib(tensors):
    folder = OUT / "loralib"
    folder.mkdir()
    cases = {}
    for name, enable in {"gpt2_qv": [True, False, True], "gpt2_v": [False, False, True], "gpt2_qkv": [True] * 3}.items():
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_pretrained(HERE / "gpt2/model")
        width = model.config.n_embd
        replaced(model, "c_attn", lambda m: lora.MergedLinear(width, 3 * width, r=4, lora_alpha=12, enable_lora=enable,
                                                              fan_in_fan_out=True))
        save_loralib(model, name, {"model": "gpt2", "r": 4, "lora_alpha": 12, "enable_lora": enable}, cases, tensors,
                     nested=True)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(HERE / "llama2/model")
    for target in ("q_proj", "v_proj", "down_proj"):
        replaced(model, target, lambda m: lora.Linear(m.in_features, m.out_features, r=3, lora_alpha=6, bias=False))
    save_loralib(model, "llama2", {"model": "llama2", "r": 3, "lora_alpha": 6, "enable_lora": None}, cases, tensors)
    return cases


def save_loralib(model, name, about, cases, tensors, nested=False):
    for key, p in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(p, std=0.2)
    state = lora.lora_state_dict(model)
    torch.save({"model_state_dict": state} if nested else state, OUT / "loralib" / f"{name}.pt")
    logits(model, f"loralib.{name}", tensors)
    cases[name] = about


def adapterhub(tensors):
    (OUT / "adapterhub").mkdir()
    cases = {}
    models = {"roberta_masked_lm": AutoModelForMaskedLM, "bert_masked_lm": AutoModelForMaskedLM, "gpt2": AutoModelForCausalLM,
              "llama2": AutoModelForCausalLM}
    for model_name, cls in models.items():
        for method, config in {
            "adapter-p": adapters.SeqBnConfig(reduction_factor=4),
            "adapter-h": adapters.DoubleSeqBnConfig(reduction_factor=4, non_linearity="gelu"),
            "swish": adapters.DoubleSeqBnConfig(reduction_factor=4),
            "prefix": adapters.PrefixTuningConfig(flat=True, prefix_length=3),
            "prefix-mlp": adapters.PrefixTuningConfig(flat=False, prefix_length=3, bottleneck_size=5),
        }.items():
            if (method == "swish" and model_name != "roberta_masked_lm") or (method == "prefix-mlp" and model_name != "gpt2"):
                continue
            torch.manual_seed(4)
            model = cls.from_pretrained(HERE / model_name / "model", attn_implementation="eager")
            adapters.init(model)
            model.add_adapter("golden", config=config)
            model.set_active_adapters("golden")
            for key, p in model.named_parameters():
                if "golden" in key:
                    torch.nn.init.normal_(p, std=0.3)
            folder = OUT / "adapterhub" / f"{model_name}-{method}"
            model.save_adapter(folder, "golden", with_head=False)
            path = folder / "adapter_config.json"
            saved = json.loads(path.read_text())
            saved["model_name"] = f"../{model_name}/model"
            path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
            logits(model, f"adapterhub.{model_name}-{method}", tensors)
            cases[f"{model_name}-{method}"] = {"model": model_name, "method": method}
    return cases


def main():
    check_versions()
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    torch_files()
    tensors = {}
    about = {"versions": PINNED, "ids": IDS, "loralib": loralib(tensors), "adapterhub": adapterhub(tensors)}
    save_file(tensors, OUT / "logits.safetensors", metadata={"format": "pt"})
    (OUT / "foreign.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    main()
