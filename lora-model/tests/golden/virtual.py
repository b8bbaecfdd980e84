"""Writes the golden files of virtual tokens: what Transformers and PEFT say of prompt tuning and prefix tuning.

    .venv/bin/python lora-model/tests/golden/virtual.py    # installed as make.py says, after it and architectures.py

Each row of `CASES` takes the model of another golden folder and becomes two files in `virtual/`:

    CASE.json           the data as architectures.py describes it; the variants, each with its method, the numbers of
                        virtual tokens before the text (`prefix`) and after the prompt (`infix`), the parameter's name
                        and the loss
    CASE.safetensors    VARIANT.parameter    [prefix + infix, width], or [prefix + infix, 2 * layers * columns of keys]
                        VARIANT.logits       [own tokens of all sequences, vocab] or [sequences, labels]
                        VARIANT.grad         of the parameter

With a prefix alone PEFT has the same, and the script asserts that it does. An infix PEFT does not have: embeddings are
put between those of the prompt and the rest, and its keys and values stand in Transformers' cache, where a mask keeps
the prompt from seeing them. A target is predicted from the row before it, of an infix of embeddings from its last one;
keys and values are no rows, so there the prompt's last row predicts. An encoder's infix stands at the end.

A text is classified by its first own token. PEFT's prompt tuning looks at the first row, which is a virtual token; the
assertion does so too. Precision and errors are as in architectures.py.
"""

import json
import os
import warnings
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from architectures import ILL_CONDITIONED, exact_rope, in_precision
from common import PINNED, check_versions, relative
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import DynamicCache

HERE = Path(__file__).resolve().parent

LENGTHS = [4, 7, 5]
FIRST_ROWS = [0, 3, 4]  # that predict: after one token, within the sequence, at its end
CASES = {
    "gpt2": ("GPT2LMHeadModel", "transformer.wte"),
    "llama3": ("LlamaForCausalLM", "model.embed_tokens"),
    "bert_classification": ("BertForSequenceClassification", "bert.embeddings.word_embeddings"),
}
VARIANTS = {
    "embed_prefix": ("pre-embed", 3, 0),
    "embed_infix": ("pre-embed", 1, 2),
    "layer_prefix": ("pre-layer", 3, 0),
    "layer_infix": ("pre-layer", 1, 2),
}


def main():
    check_versions()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    (HERE / "virtual").mkdir(exist_ok=True)
    os.chdir(HERE)
    for name, (cls, embedding) in CASES.items():
        torch.manual_seed(zlib.crc32(name.encode()))
        write(name, getattr(transformers, cls), embedding)


def write(name, cls, embedding):
    config = cls.config_class.from_pretrained(f"{name}/model")
    data = make_data(config, "SequenceClassification" in cls.__name__)
    tensors, variants = {}, {}
    for variant, (method, prefix, infix) in VARIANTS.items():
        embeds = method == "pre-embed"
        kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        cols = kv_heads * (config.hidden_size // config.num_attention_heads)
        width = config.hidden_size if embeds else 2 * config.num_hidden_layers * cols
        parameter = torch.randn(prefix + infix, width) * (0.3 if embeds else 1.0)

        def run(dtype, autocast=False):
            return compute(load(name, cls, dtype), data, method, prefix, parameter, dtype, autocast)

        exact = run(torch.float64)
        assert exact[2].norm() > 0
        if infix == 0:
            check_peft(name, cls, data, method, parameter)
        f32 = errors(run(torch.float32), exact)
        half = [errors(run(torch.bfloat16), exact), errors(run(torch.float32, True), exact)]
        variants[variant] = {
            "method": method, "prefix": prefix, "infix": infix,
            "parameter": f"{embedding if embeds else 'past_key_values'}.prompt_embeddings",
            "loss": exact[1], "f32_vs_f64": f32, "bf16_vs_f64": {k: max(e[k] for e in half) for k in f32},
        }
        print(f"{name} {variant}: {max(f32.values()):.1e}")
        assert max(f32.values()) < ILL_CONDITIONED, f32
        tensors |= {f"{variant}.{k}": v.float().contiguous()
                    for k, v in (("parameter", parameter), ("logits", exact[0]), ("grad", exact[2]))}
    save_file(tensors, f"virtual/{name}.safetensors", metadata={"format": "pt"})
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in ({"versions": PINNED} | data).items()]
    rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in variants.items())
    lines.append(f' "variants": {{\n{rows}\n }}')
    Path(f"virtual/{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def make_data(config, classifies):
    ids = lambda n: torch.randint(5, config.vocab_size, (n,)).tolist()
    data = {"task": "classification" if classifies else "causal-lm", "sequences": [ids(n) for n in LENGTHS],
            "segments": None}
    if classifies:
        return data | {"segments": [[int(i >= 2) for i in range(n)] for n in LENGTHS], "labels": [2, 0, 1]}
    rows = [list(range(f, n)) for f, n in zip(FIRST_ROWS, LENGTHS)]  # the last predicts a token that is not there
    return data | {"target_rows": rows,
                   "target_ids": [s[r[0] + 1:] + ids(1) for s, r in zip(data["sequences"], rows)]}


def load(name, cls, dtype):
    with in_precision(dtype):
        model = cls.from_pretrained(f"{name}/model", attn_implementation="eager").to(dtype).eval()
        exact_rope(model)
    return model.requires_grad_(False)


def compute(model, data, method, prefix, parameter, dtype, autocast=False, judged_by="own"):
    """Logits of the own tokens, or of the labels; loss; gradient of the parameter."""
    p = parameter.to(torch.float32 if autocast else dtype).requires_grad_()
    logits, losing = [], []
    with in_precision(dtype), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for i, sequence in enumerate(data["sequences"]):
            ids, n = torch.tensor(sequence), len(sequence)
            causal = data["task"] == "causal-lm"
            split = data["target_rows"][i][0] + 1 if causal else n
            segments = None if causal else torch.tensor(data["segments"][i])
            if method == "pre-embed":
                run, own, predicts = embedded(model, ids, segments, p, prefix, split)
            else:
                run, own, predicts = attended(model, ids, segments, p, prefix, split, causal)
            if causal:
                logits.append(run[own])
                losing.append(run[[predicts[r] for r in data["target_rows"][i]]])
            else:
                first = own[0] if judged_by == "own" else 0
                logits.append(model.classifier(model.bert.pooler(run[None, first:])))
        logits = torch.cat(logits)
        targets = data["labels"] if "labels" in data else sum(data["target_ids"], [])
        loss = F.cross_entropy(torch.cat(losing) if losing else logits, torch.tensor(targets))
    return logits.detach(), loss.item(), torch.autograd.grad(loss, p)[0]


def embedded(model, ids, segments, p, prefix, split):
    """Virtual tokens among the tokens: the rows of the run (logits, of BERT hidden states), the places of the own
    ones, and for each of these the place that predicts what comes after it."""
    x = model.get_input_embeddings()(ids)
    x = torch.cat([p[:prefix].to(x.dtype), x[:split], p[prefix:].to(x.dtype), x[split:]])
    infix = len(p) - prefix
    own = [prefix + i + (infix if i >= split else 0) for i in range(len(ids))]
    predicts = [place - 1 for place in own[1:]] + [len(x) - 1]
    if segments is None:
        return model(inputs_embeds=x[None]).logits[0], own, predicts
    kinds = torch.zeros(len(x), dtype=torch.long)
    kinds[own] = segments
    return model.bert(inputs_embeds=x[None], token_type_ids=kinds[None]).last_hidden_state[0], own, predicts


def attended(model, ids, segments, p, prefix, split, causal):
    """Virtual keys and values: all of them stand first, and a mask says who sees them."""
    config, n, infix = model.config, len(ids), len(p) - prefix
    cache = DynamicCache(config=config)
    for layer, kv in enumerate(p.view(len(p), config.num_hidden_layers, 2, -1).unbind(1)):
        head_dim = config.hidden_size // config.num_attention_heads
        k, v = (part.view(1, len(p), -1, head_dim).transpose(1, 2) for part in kv.unbind(1))
        cache.update(k, v, layer)
    after = torch.arange(n) >= split
    seen = torch.ones(n, len(p) + n, dtype=torch.bool)
    if causal:
        seen[:, prefix:len(p)] = after[:, None]
        seen[:, len(p):] = torch.ones(n, n, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=p.dtype).masked_fill(~seen, torch.finfo(p.dtype).min)
    positions = torch.arange(n) + prefix + infix * after
    inputs = {"input_ids": ids[None], "position_ids": positions[None], "past_key_values": cache,
              "attention_mask": mask[None, None]}
    own = list(range(n))
    if segments is None:
        return model(**inputs).logits[0], own, own
    return model.bert(**inputs, token_type_ids=segments[None]).last_hidden_state[0], own, own


def check_peft(name, cls, data, method, parameter):
    """PEFT's own forward pass gives the same logits."""
    n = len(parameter)
    task = "CAUSAL_LM" if data["task"] == "causal-lm" else "SEQ_CLS"
    config = (PromptTuningConfig if method == "pre-embed" else PrefixTuningConfig)(task_type=task, num_virtual_tokens=n)
    ours = compute(load(name, cls, torch.float64), data, method, n, parameter, torch.float64, judged_by="peft")[0]
    model = get_peft_model(load(name, cls, torch.float64), config).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    assert weight.shape == parameter.shape
    model.prompt_encoder["default"].double()
    model.prompt_encoder["default"].embedding.weight.data.copy_(parameter)
    theirs = []
    with in_precision(torch.float64), torch.no_grad():
        for i, sequence in enumerate(data["sequences"]):
            more = {"token_type_ids": torch.tensor([data["segments"][i]])} if data["segments"] else {}
            ids = torch.tensor([sequence])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
            theirs.append(logits[0, -len(sequence):] if logits.dim() == 3 else logits)
    error = relative(theirs, [ours])
    assert error < 1e-12, f"{name}: PEFT's {method} differs by {error:.1e}"


def errors(x, reference):
    return {"logits": relative([x[0]], [reference[0]]), "loss": abs(x[1] / reference[1] - 1),
            "grad": relative([x[2]], [reference[2]])}


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")  # PEFT calls what Transformers renames
    main()
