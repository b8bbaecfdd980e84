"""Writes the golden files of PEFT's own adapters: its methods and options on a model of each architecture.

    .venv/bin/python lora-model/tests/golden/peft_matrix.py [MODEL ...]    # installed as make.py says, after it and architectures.py

Each row of `MODELS` takes the model of another golden folder, and each row of `VARIANTS` that fits it becomes

    peft/MODEL/VARIANT/         the adapter as PEFT saves it, all of its parameters random, or as it began (BEGUN)
    peft/MODEL.safetensors      VARIANT    logits, [own tokens of all sequences, vocab] or [sequences, labels]
                                VARIANT.residual.MODULE    of one module of BEGUN, what its start left of the base's weight
    peft/MODEL.json             the data: sequences, target_rows (within the sequence) and target_ids, or labels; the
                                variants, each with its `losses`, how far PyTorch's own f32 is from them, and for some
                                of them (LORAPLUS) the `loraplus_losses` of PEFT's LoRA+

A loss is the mean over all targets. `losses` are those before each of ten steps of AdamW (`LR`, `WEIGHT_DECAY`) that begin
at the saved adapter, in f64, where nothing is dropped out. Every sequence runs alone, so there is no padding to argue about.
The weights are those of the f32 files, the references are computed in f64 and stored rounded to f32; so are the
decompositions that PiSSA and OLoRA begin at. Running the script again writes the same values.
"""

import copy
import json
import os
import shutil
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
import torch.nn.functional as F
import transformers
from architectures import exact_rope, in_precision
from common import PINNED, check_versions, relative
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent

LENGTHS = [4, 7, 5]
FIRST_ROWS = [0, 3, 1]  # that predict
STEPS, LR, WEIGHT_DECAY = 10, 1e-2, 0.01
CUT = "adalora_cut"

# Saved as they begin. What they begin at, PEFT takes from the base, and again whenever it loads such an adapter.
BEGUN = ("pissa", "olora")
# Saved a second time as PEFT converts it for the base as it is.
CONVERTED = {"pissa_moved": "pissa_converted"}
# Trained once more by PEFT's LoRA+: `loraplus_losses`.
LORAPLUS = ("default", "modules_to_save", "bias_all", "dora_patterns", "embedding", "adalora")
LORAPLUS_RATES = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_lr_embedding": 5e-3, "loraplus_weight_decay": 0.1}

# The class, and the names of some of its modules: one attention projection and another, a map of the MLP, a norm, the
# embeddings, and what stands before a layer's number.
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "c_attn", "attn.c_proj", "c_fc", "ln_1", "wte", "h"),
    "bert_classification": (
        "BertForSequenceClassification", "query", "value", "intermediate.dense", "output.LayerNorm", "word_embeddings",
        "layer"),
    "roberta_classification": (
        "RobertaForSequenceClassification", "key", "value", "intermediate.dense", "output.LayerNorm", "word_embeddings",
        "layer"),
    "llama3": ("LlamaForCausalLM", "q_proj", "v_proj", "up_proj", "input_layernorm", "embed_tokens", "layers"),
    "qwen2": ("Qwen2ForCausalLM", "k_proj", "v_proj", "down_proj", "input_layernorm", "embed_tokens", "layers"),
    "llama2": ("LlamaForCausalLM", "q_proj", "v_proj", "up_proj", "input_layernorm", "embed_tokens", "layers"),
}
# With an output head of its own, and the rows that need one.
UNTIED = ("llama2",)


def lora(**options):
    return lambda task: peft.LoraConfig(task_type=task, **({"r": 2, "lora_alpha": 3} | options))


def lokr(**options):
    return lambda task: peft.LoKrConfig(task_type=task, **({"r": 2, "alpha": 3} | options))


def adalora(**options):
    return lambda task: peft.AdaLoraConfig(task_type=task, **({
        "init_r": 4, "target_r": 2, "lora_alpha": 3, "tinit": 1, "tfinal": 3, "deltaT": 2, "total_step": STEPS} | options))


def variants(first, second, mlp, norm, embedding, layers):
    """Name -> the configuration for a task."""
    return {
        "default": lora(),
        "rslora": lora(use_rslora=True, r=4, target_modules=[first, mlp]),
        "regex": lora(target_modules=rf".*\.1\..*({first}|{mlp})".replace("attn.c_proj", r"attn\.c_proj")),
        "lookahead": lora(target_modules=rf"(?!.*\.0\.).*{layers}\.\d+\..*({first}|{second})"),
        "all_linear": lora(target_modules="all-linear"),
        "exclude": lora(target_modules=[first, second, mlp], exclude_modules=[f"0.{x}" for x in ("attn", "mlp")]
                        + [mlp]),
        "exclude_regex": lora(target_modules="all-linear", exclude_modules=rf".*{first}|.*\.0\..*"),
        "patterns": lora(
            target_modules=[first, second, mlp], rank_pattern={first: 1, rf".*\.1\..*{mlp}": 4},
            alpha_pattern={second: 7, rf".*\.0\..*": 5.5}),
        # Above the smaller side of a matrix.
        "rank_above": lora(target_modules=[first, mlp], r=40, lora_alpha=10, rank_pattern={mlp: 3}),
        "layers_to_transform": lora(target_modules=[first, mlp], layers_to_transform=1),
        "layers_pattern": lora(target_modules=[first, mlp], layers_to_transform=[0], layers_pattern=layers),
        "modules_to_save": lora(target_modules=[first], modules_to_save=[norm, f"1.{'intermediate' if layers == 'layer' else 'mlp'}"]),
        "bias_all": lora(target_modules=[second], bias="all"),
        "bias_lora_only": lora(target_modules=[first, mlp], bias="lora_only"),
        "dora": lora(target_modules=[first, mlp], use_dora=True),
        "dora_patterns": lora(
            target_modules="all-linear", use_dora=True, use_rslora=True, bias="lora_only", rank_pattern={mlp: 1}),
        "gaussian": lora(init_lora_weights="gaussian"),
        "init_false": lora(init_lora_weights=False, target_modules=[second]),
        "orthogonal": lora(init_lora_weights="orthogonal", target_modules=[first, second]),
        "pissa": lora(init_lora_weights="pissa", target_modules=[first, mlp]),
        "pissa_moved": lora(init_lora_weights="pissa", target_modules=[second, mlp], rank_pattern={mlp: 3},
                            alpha_pattern={second: 5}),
        "pissa_rslora": lora(init_lora_weights="pissa", use_rslora=True, r=3, target_modules=[second]),
        "pissa_dora": lora(init_lora_weights="pissa", use_dora=True, target_modules=[first, mlp]),
        # PEFT's does not know weights stored [in, out]: the factors get each other's shapes.
        "olora": lambda task: None if first == "c_attn" else lora(
            init_lora_weights="olora", target_modules=[first, mlp])(task),
        "embedding": lora(target_modules=[embedding, first]),
        "embeddings": lora(
            target_modules=rf".*({embedding}|wpe|position_embeddings|token_type_embeddings)", use_rslora=True,
            rank_pattern={embedding: 3},
            alpha_pattern={} if layers == "layers" else {"wpe|.*position_embeddings": 5}),
        "embedding_pissa": lora(target_modules=[embedding, mlp], init_lora_weights="pissa"),
        "ia3": lambda task: peft.IA3Config(task_type=task),
        "ia3_feedforward": lambda task: peft.IA3Config(
            task_type=task, target_modules=rf".*({first}|{mlp})", feedforward_modules=[mlp]),
        "vera": lambda task: peft.VeraConfig(task_type=task, r=5),
        "vera_all_linear": lambda task: peft.VeraConfig(
            task_type=task, r=3, target_modules="all-linear", projection_prng_key=7, modules_to_save=[norm]),
        "vera_drawn": lambda task: peft.VeraConfig(
            task_type=task, r=4, target_modules=[first, mlp], layers_to_transform=1, projection_prng_key=123456,
            save_projection=False),
        "adalora": adalora(),
        "adalora_all_linear": adalora(target_modules="all-linear", exclude_modules=[second], tinit=2, deltaT=1, tfinal=2,
                                      orth_reg_weight=0.1, modules_to_save=[norm]),
        # Trained before, so that its budget is cut.
        CUT: adalora(target_modules=[first, second, mlp]),
        # PEFT has no default for encoders.
        "ln_tuning": lambda task: peft.LNTuningConfig(
            task_type=task, target_modules=["LayerNorm"] if task == "SEQ_CLS" else None),
        "ln_tuning_some": lambda task: peft.LNTuningConfig(
            task_type=task, target_modules=rf".*{norm}", exclude_modules=["1." + norm], modules_to_save=[second]),
        "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
        "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
        # PEFT has it for linear maps alone, not for Conv1D.
    } | ({} if first == "c_attn" else {
        "lokr": lokr(),
        "lokr_both": lokr(r=1, target_modules=[first, mlp], decompose_both=True, modules_to_save=[norm]),
        "lokr_patterns": lokr(
            target_modules="all-linear", exclude_modules=rf".*\.1\..*{second}", decompose_factor=4,
            rank_pattern={mlp: 1, first: 30}, alpha_pattern={rf".*\.0\..*": 5.5}),
        "lokr_layers": lokr(target_modules=[second], layers_to_transform=[1], layers_pattern=layers),
    })


def untied_variants(first, second, mlp, norm, embedding, layers):
    """The same where the output head is a linear map of its own."""
    return {
        "lm_head": lora(target_modules=["lm_head", first]),
        "lm_head_alone": lora(target_modules=["lm_head"], r=3, use_rslora=True),
        "lm_head_embedding": lora(target_modules=["lm_head", embedding], rank_pattern={"lm_head": 4}),
        "lm_head_pissa": lora(target_modules=["lm_head", second], init_lora_weights="pissa"),
    }


def main(names):
    check_versions()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    exact_decompositions()
    os.chdir(HERE)  # PEFT writes the path of the base into the adapter's config: a relative one is the same everywhere
    for name in names or MODELS:
        write(name, *MODELS[name])


def exact_decompositions():
    """PEFT decomposes weights in f32, where directions of singular values near to each other are off by up to 3e-5."""
    for name in ("svd", "qr"):
        plain = getattr(torch.linalg, name)
        exact = lambda x, *a, plain=plain, **k: tuple(part.to(x.dtype) for part in plain(x.double(), *a, **k))
        setattr(torch.linalg, name, exact)


def write(name, cls, *modules):
    cls = getattr(transformers, cls)
    folder = Path("peft", name)
    shutil.rmtree(folder, ignore_errors=True)
    data = make_data(name, cls)
    task = "SEQ_CLS" if "labels" in data else "CAUSAL_LM"
    tensors, rows = {}, {}
    for variant, config in (untied_variants if name in UNTIED else variants)(*modules).items():
        # Of the names, so that a new case changes no other.
        torch.manual_seed(zlib.crc32(f"{name} {variant}".encode()))
        config = config(task)
        if config is None:
            continue
        model = peft.get_peft_model(load(name, cls), config).eval()
        # The conversion leaves out all but the factors, a classifier's head too.
        converted = CONVERTED.get(variant) if task == "CAUSAL_LM" else None
        with tempfile.TemporaryDirectory() as initial:
            initial = Path(initial, "initial")
            if converted:
                begun = copy.deepcopy(model)
                begun.peft_config["default"].init_lora_weights = True
                begun.save_pretrained(initial)
            if variant in BEGUN:
                module, layer = next((n, m) for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A"))
                tensors[f"{variant}.residual.{module}"] = layer.base_layer.weight.data.clone()
            for parameter in (p for p in model.parameters() if p.requires_grad and variant not in BEGUN):
                parameter.data += 0.2 * torch.randn_like(parameter)
            if variant == CUT:
                train(model, data, torch.float32)
            save(model, folder / variant)
            if converted:
                save(model, folder / converted, path_initial_model_for_weight_conversion=str(initial))
        for variant in filter(None, (variant, converted)):
            results = {}
            for dtype in (torch.float32, torch.float64):
                # PEFT does not go on with virtual tokens of a file.
                fresh = copy.deepcopy(model) if config.is_prompt_learning else peft.PeftModel.from_pretrained(
                    load(name, cls), folder / variant, is_trainable=True)
                results[dtype] = train(fresh.to(dtype).eval(), data, dtype)
            logits, losses = results[torch.float64]
            error = [relative([results[torch.float32][0]], [logits]),
                     max(abs(x / y - 1) for x, y in zip(results[torch.float32][1], losses))]
            print(f"{name} {variant}: logits {error[0]:.1e}, losses {error[1]:.1e}")
            assert losses[-1] < losses[0] and error[0] < 3e-6 and error[1] < 3e-5, (losses, error)
            tensors[variant] = logits.float().contiguous()
            rows[variant] = {"losses": losses, "f32_vs_f64": dict(zip(("logits", "losses"), error))}
            if variant in LORAPLUS:
                fresh = peft.PeftModel.from_pretrained(load(name, cls), folder / variant, is_trainable=True).double().eval()
                optimiser = create_loraplus_optimizer(fresh, torch.optim.AdamW, **LORAPLUS_RATES)
                rows[variant]["loraplus_losses"] = train(fresh, data, torch.float64, optimiser)[1]
    save_file(tensors, f"peft/{name}.safetensors", metadata={"format": "pt"})
    head = {"versions": PINNED} | data | {"adamw": {"lr": LR, "weight_decay": WEIGHT_DECAY}, "loraplus": LORAPLUS_RATES}
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
    rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items())
    lines.append(f' "variants": {{\n{rows}\n }}')
    Path(f"peft/{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def make_data(name, cls):
    torch.manual_seed(zlib.crc32(name.encode()))
    config = cls.config_class.from_pretrained(f"{name}/model")
    ids = lambda n: torch.randint(5, config.vocab_size, (n,)).tolist()
    data = {"sequences": [ids(n) for n in LENGTHS]}
    if "SequenceClassification" in cls.__name__:
        return data | {"labels": [2, 0, 1]}
    rows = [list(range(f, n - 1)) for f, n in zip(FIRST_ROWS, LENGTHS)]
    return data | {"target_rows": rows, "target_ids": [s[r[0] + 1:] for s, r in zip(data["sequences"], rows)]}


def load(name, cls):
    return cls.from_pretrained(f"{name}/model", attn_implementation="eager")


def save(model, folder, **options):
    """PEFT's folder, without what is empty in it or differs from run to run: the order of sets."""
    model.save_pretrained(folder, **options)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(saved.get(key), list):
            saved[key].sort()
    path.write_text(json.dumps(saved, indent=2, sort_keys=True))


def train(model, data, dtype, optimiser=None):
    """The logits and the losses of training."""
    optimiser = optimiser or torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=WEIGHT_DECAY)
    # With a budget that has been cut it trains on with the ranks it has.
    allocates = is_adalora(model) and model.active_peft_config.rank_pattern is None
    first, losses = None, []
    with in_precision(dtype):
        exact_rope(model)
        for step in range(1, STEPS + 1):
            logits, targets = zip(*(forward(model, data, i) for i in range(len(data["sequences"]))))
            first = torch.cat(logits).detach() if first is None else first
            loss = F.cross_entropy(
                torch.cat([x[t] for x, (t, _) in zip(logits, targets)]), torch.tensor(sum((i for _, i in targets), [])))
            loss = loss + penalty(model)
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if allocates:
                model.base_model.update_and_allocate(step)
    return first, losses


def is_adalora(model):
    return isinstance(model.base_model, peft.AdaLoraModel)


def penalty(model):
    """What PEFT's AdaLoRA adds to the loss of a model that has one."""
    if not is_adalora(model):
        return 0.0
    inner = model.base_model.model
    inner.forward = lambda: SimpleNamespace(loss=torch.zeros(()))
    try:
        return model.base_model.forward().loss
    finally:
        del inner.forward


def forward(model, data, i):
    """[tokens, vocab] of a language model or [1, labels], and the rows that predict with what they predict."""
    ids = torch.tensor([data["sequences"][i]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if logits.dim() == 2:
        return logits, ([0], [data["labels"][i]])
    return logits[0, -ids.shape[1]:], (data["target_rows"][i], data["target_ids"][i])


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")  # PEFT calls what Transformers renames
    main(sys.argv[1:])
