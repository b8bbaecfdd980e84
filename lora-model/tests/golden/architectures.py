"""Writes the golden files of every architecture beside GPT-2: what PyTorch, Transformers and PEFT say.

    .venv/bin/python lora-model/tests/golden/architectures.py [CASE ...]    # installed as make.py says

Each row of `CASES` becomes a folder next to this script:

    model/, adapter/      as Transformers and PEFT save them; `old` writes the config as Transformers 4 did
    golden.safetensors    logits.base, logits.adapter    [rows of all sequences, vocab] or [sequences, labels]
                          grad.full.NAME                 of every parameter of the base, by its name in the file
                          grad.adapter.NAME              of everything in the adapter's file, by its name there
    golden.json           task, sequences, segments (token types), target_rows (within the sequence) and target_ids, or
                          labels, or values; the losses; versions

A loss is the mean over all targets of the cross-entropy, or of the squared error. Every sequence runs alone, so there
is no padding to argue about.

The weights are random f32 numbers. The reference values are computed from them in f64, also where Transformers asks for
f32, and stored rounded to f32. `f32_vs_f64` in golden.json says how far PyTorch's own f32 is from them (relative:
|x - ref| / |ref|), `bf16_vs_f64` how far its bf16 is, throughout or by autocast, whichever is farther. `zero` lists the
gradients that are zero by the mathematics (a bias of the keys adds the same to all scores of a query): stored as zeros,
they are held against the whole gradient. Running the script again writes the same values.
"""

import json
import os
import shutil
import sys
import warnings
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from common import PINNED, check_versions, relative, save_adapter, trainable
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent

VOCAB = 61
LENGTHS = [5, 12, 9, 7]
FIRST_ID, MASK_ID = 5, 4  # the ids below are kept for the special tokens
NEGLIGIBLE = 1e-12  # of the whole gradient
ILL_CONDITIONED = 3e-6  # PyTorch's own f32 should be well within the tests' 1e-5

COMMON = {"vocab_size": VOCAB, "num_hidden_layers": 2}
ENCODER = COMMON | {
    "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 28,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}
ROBERTA = ENCODER | {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DEBERTA = ENCODER | {
    "relative_attention": True, "position_biased_input": False, "type_vocab_size": 0, "pos_att_type": "c2p|p2c",
    "layer_norm_eps": 1e-7, "max_relative_positions": -1, "pooler_hidden_act": "gelu", "pooler_dropout": 0,
}
LLAMA = COMMON | {
    "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
}

BERT_TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
DEBERTA_TARGETS = ["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"]
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def case(model, config, targets, old=False, **more):
    """One architecture: its class and config, the modules with LoRA, and what differs from the rest."""
    return {"model": model, "config": config, "targets": targets, "old": old} | more


def rope(theta=10000.0, **parameters):
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"} | parameters}


CASES = {
    "bert_classification": case(
        "BertForSequenceClassification", ENCODER | {"num_labels": 3}, BERT_TARGETS, pairs=True),
    "bert_regression": case(
        "BertForSequenceClassification", ENCODER | {"num_labels": 1}, ["query", "value", "intermediate.dense"]),
    "bert_masked_lm": case(
        "BertForMaskedLM", ENCODER | {"hidden_act": "gelu_new"}, ["query", "value", "output.dense"], old=True),
    "roberta_classification": case(
        "RobertaForSequenceClassification", ROBERTA | {"num_labels": 3}, ["query", "value", "intermediate.dense"]),
    "roberta_regression": case(
        "RobertaForSequenceClassification", ROBERTA | {"num_labels": 1}, BERT_TARGETS, salt=2),
    "roberta_masked_lm": case(
        "RobertaForMaskedLM", ROBERTA, ["query", "key", "value", "output.dense"], old=True),
    "llama2": case(
        "LlamaForCausalLM", LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 4}, LLAMA_TARGETS),
    "llama3": case(
        "LlamaForCausalLM", LLAMA | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
                                     "tie_word_embeddings": True} | rope(
            500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64) | {"max_position_embeddings": 512},
        ["q_proj", "v_proj", "down_proj"], old="rope_type"),
    "llama_linear": case(
        "LlamaForCausalLM", LLAMA | rope(rope_type="linear", factor=4.0), ["q_proj", "o_proj", "up_proj"], old="type",
        salt=1),
    "llama_yarn": case(
        "LlamaForCausalLM", LLAMA | rope(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.02)
        | {"max_position_embeddings": 64},
        ["q_proj", "k_proj", "gate_proj"]),
    "llama_dynamic": case(
        "LlamaForCausalLM", LLAMA | rope(rope_type="dynamic", factor=2.0), ["k_proj", "v_proj", "gate_proj"]),
    "mistral": case(
        "MistralForCausalLM", LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
                                       "sliding_window": 16}, ["q_proj", "v_proj", "o_proj", "up_proj"], old=True),
    "smollm": case(
        "LlamaForCausalLM", LLAMA | {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2,
                                     "tie_word_embeddings": True} | rope(100000.0), LLAMA_TARGETS, old=True),
    "qwen2": case(
        "Qwen2ForCausalLM", LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
        | rope(1000000.0), ["q_proj", "k_proj", "v_proj", "down_proj"], old=True, salt=1),
    "qwen3": case(
        "Qwen3ForCausalLM", LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        | rope(1000000.0), LLAMA_TARGETS),
    "deberta_v2_classification": case(
        "DebertaV2ForSequenceClassification", DEBERTA | {
            "num_labels": 3, "conv_kernel_size": 3, "conv_act": "gelu", "position_buckets": 4,
            "share_att_key": False, "norm_rel_ebd": "layer_norm"},
        DEBERTA_TARGETS + ["pos_key_proj", "pos_query_proj"], old=True),
    "deberta_v3_regression": case(
        "DebertaV2ForSequenceClassification", DEBERTA | {
            "num_labels": 1, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm",
            "pos_att_type": "p2c|c2p"},
        DEBERTA_TARGETS, lengths=[6, 25, 13, 18]),
    "deberta_v2_masked_lm": case(
        "DebertaV2ForMaskedLM", DEBERTA | {"position_buckets": 6, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        ["query_proj", "value_proj", "output.dense"]),
    "deberta_v2_biased": case(
        "DebertaV2ForMaskedLM", DEBERTA | {
            "position_biased_input": True, "type_vocab_size": 2, "pos_att_type": ["p2c"], "max_relative_positions": 7,
            "conv_kernel_size": 5, "legacy": False, "hidden_act": "gelu_new"},
        ["query_proj", "pos_query_proj", "intermediate.dense"], pairs=True),
}


def main(names):
    check_versions()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in names or CASES:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # PEFT writes the path of the base into the adapter's config: a relative one is the same everywhere.
        os.chdir(folder)
        # Of the name, so that a new case changes no other.
        torch.manual_seed(zlib.crc32(name.encode()) + CASES[name].get("salt", 0))
        write(name, CASES[name])


def write(name, case):
    make_model(case)
    make_adapter(case)
    data = make_data(case)
    tensors, golden = {}, {"versions": PINNED} | data | {"loss": {}, "f32_vs_f64": {}, "bf16_vs_f64": {}, "zero": []}
    for which in ("base", "adapter"):
        logits, loss, gradients = run(case, which, torch.float64, data)
        single = run(case, which, torch.float32, data)
        grad = "full" if which == "base" else which
        zero = negligible(gradients)
        golden["zero"] += [f"grad.{grad}.{n}" for n in zero]
        golden["loss"][which] = loss
        exact = (logits, loss, gradients)
        golden["f32_vs_f64"] |= errors(single, exact, which, grad, zero)
        half = [errors(run(case, which, dtype, data, autocast), exact, which, grad, zero)
                for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True))]
        golden["bf16_vs_f64"] |= {k: max(e[k] for e in half) for k in half[0]}
        tensors[f"logits.{which}"] = logits
        tensors |= {f"grad.{grad}.{n}": g * (n not in zero) for n, g in gradients.items()}
    save_file({k: v.float().contiguous() for k, v in tensors.items()}, "golden.safetensors", metadata={"format": "pt"})
    lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in golden.items())
    Path("golden.json").write_text(f"{{\n{lines}\n}}\n")
    worst = max(golden["f32_vs_f64"].values())
    print(f"{name}: {worst:.1e}")
    assert worst < ILL_CONDITIONED, f"{golden['f32_vs_f64']}: give the case another salt"


# The files a user would have -----------------------------------------------------------------------------------------


def make_model(case):
    """A model in which every tensor matters: biases and norms are random too, logits are of order 1."""
    cls = getattr(transformers, case["model"])
    model = cls(cls.config_class(**case["config"]))
    for name, p in model.named_parameters():
        if p.dim() == 1 and name.endswith("weight"):
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
        else:
            torch.nn.init.normal_(p, std=0.2 if p.dim() == 1 else 0.3)
    model.save_pretrained("model")
    if case["old"]:
        as_transformers_4(case["old"])


def as_transformers_4(key):
    """The config in the words of most files that people have; `key` is the one for the kind of RoPE scaling."""
    path = Path("model", "config.json")
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    if rope := config.pop("rope_parameters", None):
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {key: kind} | rope
    if "pos_att_type" in config:
        config["pos_att_type"] = "|".join(config["pos_att_type"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make_adapter(case):
    """A PEFT adapter whose B is not zero, so that A has a gradient, with a head that differs from the base's."""
    head = "SequenceClassification" in case["model"]
    task = "SEQ_CLS" if head else "CAUSAL_LM" if "CausalLM" in case["model"] else None
    config = LoraConfig(task_type=task, r=2, lora_alpha=4, lora_dropout=0.0, target_modules=case["targets"])
    model = get_peft_model(getattr(transformers, case["model"]).from_pretrained("model"), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
        elif "modules_to_save" in name:
            p.data += 0.2 * torch.randn_like(p)
    save_adapter(model, "adapter")


def make_data(case):
    """Sequences with what is to be predicted."""
    ids = lambda n: torch.randint(FIRST_ID, VOCAB, (n,)).tolist()
    lengths = case.get("lengths", LENGTHS)
    data = {"task": None, "sequences": [ids(n) for n in lengths], "segments": None}
    if case.get("pairs"):
        data["segments"] = [[int(i >= 2 + n // 4) for i in range(n)] for n in lengths]  # the second is the longer one
    if "CausalLM" in case["model"]:
        first = [1, 5, 3, 1]  # the first token that is predicted, from the row before it
        data |= {
            "task": "causal-lm",
            "target_rows": [list(range(f - 1, n - 1)) for f, n in zip(first, lengths)],
            "target_ids": [s[f:] for f, s in zip(first, data["sequences"])],
        }
    elif "MaskedLM" in case["model"]:
        rows = [sorted(torch.randperm(n)[: 1 + n // 4].tolist()) for n in lengths]
        data |= {"task": "masked-lm", "target_rows": rows,
                 "target_ids": [[s[i] for i in r] for r, s in zip(rows, data["sequences"])]}
        for sequence, r in zip(data["sequences"], rows):
            for i in r[:-1] or r:  # the last of several stays as it is, as BERT's masking leaves one in ten
                sequence[i] = MASK_ID
    elif case["config"]["num_labels"] == 1:
        data |= {"task": "regression", "values": [round(v, 3) for v in torch.randn(len(lengths)).tolist()]}
    else:
        data |= {"task": "classification", "labels": [2, 0, 1, 2]}
    return data


# Forward, loss, gradients --------------------------------------------------------------------------------------------


class Double:
    """The module `torch` in which asking for f32 gives f64."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextmanager
def in_precision(dtype):
    """Norms, softmax and RoPE that Transformers computes in f32 whatever the model's dtype is follow an f64 model."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            models = name.startswith("transformers.models.") or name == "transformers.modeling_rope_utils"
            if dtype is torch.float64 and models and "torch" in vars(module):
                stack.enter_context(mock.patch.object(module, "torch", Double()))
        yield


def run(case, which, dtype, data, autocast=False):
    """Logits, loss and gradients of everything that trains: all of the base, or the adapter on it."""
    with in_precision(dtype), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # Eager attention is the formula as it is written; the fused kernels differ from it in rounding alone.
        model = getattr(transformers, case["model"]).from_pretrained("model", attn_implementation="eager")
        with safe_open("model/model.safetensors", "pt") as file:
            assert set(file.keys()) == set(dict(model.named_parameters()))
        if which == "adapter":
            model = PeftModel.from_pretrained(model, which, is_trainable=True)
        model = model.to(dtype).train()
        exact_rope(model)
        logits = torch.cat([forward(model, data, i) for i in range(len(data["sequences"]))])
        loss = loss_of(logits, data)
    loss.backward()
    return logits.detach(), loss.item(), {n: p.grad for n, p in trainable(model).items()}


def exact_rope(model):
    """The frequencies of RoPE again: from_pretrained made them in f32."""
    for name, _ in list(model.named_buffers()):
        if name.endswith("inv_freq"):
            module = model.get_submodule(name.rpartition(".")[0])
            module.inv_freq = type(module)(config=module.config).inv_freq


def forward(model, data, i):
    """[tokens, vocab] of a language model, [1, labels] else."""
    inputs = {"input_ids": torch.tensor([data["sequences"][i]])}
    if data["segments"]:
        inputs["token_type_ids"] = torch.tensor([data["segments"][i]])
    logits = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits
    return logits[0] if logits.dim() == 3 else logits


def loss_of(logits, data):
    if data["task"] == "regression":
        return F.mse_loss(logits[:, 0], torch.tensor(data["values"], dtype=logits.dtype))
    if data["task"] == "classification":
        return F.cross_entropy(logits, torch.tensor(data["labels"]))
    rows, first = [], 0
    for sequence, r in zip(data["sequences"], data["target_rows"]):
        rows += [first + i for i in r]
        first += len(sequence)
    return F.cross_entropy(logits[rows], torch.tensor(sum(data["target_ids"], [])))


def errors(x, reference, which, grad, zero):
    """How far logits, loss, the whole gradient, and the worst parameter's gradient are from the reference."""
    names = reference[2].keys()
    each = {n: relative([x[2][n]], [reference[2][n]]) for n in names if n not in zero}
    return {
        f"logits.{which}": relative([x[0]], [reference[0]]),
        f"loss.{which}": abs(x[1] / reference[1] - 1),
        f"whole.{grad}": relative([x[2][n] for n in names], [reference[2][n] for n in names]),
        f"grad.{grad}": max(each.values()),
    }


def negligible(gradients):
    """Those that consist of rounding."""
    whole = torch.cat([g.flatten() for g in gradients.values()]).norm()
    return [n for n, g in gradients.items() if g.norm() < NEGLIGIBLE * whole]


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT calls what Transformers renames
    main(sys.argv[1:])
