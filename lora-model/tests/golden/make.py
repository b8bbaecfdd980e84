"""Writes the GPT-2 golden files that the tests compare with: what PyTorch, Transformers and PEFT say.

    python -m venv .venv && .venv/bin/pip install torch==2.15.0 transformers==5.23.0 peft==0.21.2
    .venv/bin/python lora-model/tests/golden/make.py

Everything goes to `gpt2/` next to this script:

    model/, adapter/, adapter_all/   as Transformers and PEFT save them
    golden.safetensors               ids, logits, gradients, final parameters
    golden.json                      losses, schedules, generated ids, versions

The weights are random f32 numbers. The reference values are computed from them in f64 and stored rounded to f32, so
that they are more exact than either side of a comparison; `f32_vs_f64` in golden.json says how far PyTorch's own f32
is from them (relative: |x - ref| / |ref|). Running the script again writes the same values.
"""

import itertools
import json
import math
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from common import PINNED, check_versions, relative, save_adapter, trainable
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList, get_linear_schedule_with_warmup
from transformers.generation import (
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

OUT = Path(__file__).resolve().parent / "gpt2"

LENGTHS = [5, 12, 9]
TARGETS_FROM = [1, 5, 3]  # the token at index j of its sequence is a target iff j >= targets_from
SMOOTHING = 0.1

STEPS = 10
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
LR = {"adapter": 1e-2, "full": 2e-3}
WARMUP, CLIP = 3, 1.0

PROMPTS = [[7, 61, 22, 90], [3, 3, 58, 14], [99, 0, 41, 41], [76, 12, 85, 30]]
BEAM_EOS = 38  # frequent enough in this model to end some of the beams early


def main():
    check_versions()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # PEFT writes the path the base was loaded from into the adapter's config: a relative one is the same everywhere.
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    os.chdir(OUT)

    make_model()
    make_adapter("adapter", seed=2, r=4, lora_alpha=8, target_modules=["c_attn"])
    make_adapter("adapter_all", seed=3, r=3, lora_alpha=6, use_rslora=True,
                 target_modules=["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"])

    batch = make_batch()
    tensors = {
        "batch.tokens": torch.tensor(list(itertools.chain(*batch))),
        "batch.boundaries": torch.tensor([0, *itertools.accumulate(LENGTHS)]),
        "batch.targets_from": torch.tensor(TARGETS_FROM),
    }
    golden = {
        "versions": PINNED,
        "batch": {"sequences": batch, "targets_from": TARGETS_FROM, "target_tokens": count_targets()},
        "loss": {}, "loss_smoothed": {}, "label_smoothing": SMOOTHING, "f32_vs_f64": {},
    }

    for name in ("base", "adapter", "adapter_all"):
        add_forward(name, batch, tensors, golden)
    add_gradients("adapter", "adapter", batch, tensors, golden)
    add_gradients("adapter", "adapter_smoothed", batch, tensors, golden, smoothing=SMOOTHING)
    add_gradients("adapter_all", "adapter_all", batch, tensors, golden)
    add_gradients("full", "full", batch, tensors, golden)
    golden["training"] = {"steps": STEPS, "adamw": ADAMW}
    add_training("adapter", "adapter", batch, tensors, golden)
    add_training("adapter", "adapter_scheduled", batch, tensors, golden, scheduled=True)
    add_training("full", "full", batch, tensors, golden)
    golden["generation"] = generation()
    golden["warped"] = warped_distribution()

    tensors = {k: (v.float() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()}
    save_file(tensors, "golden.safetensors", metadata={"format": "pt"})
    Path("golden.json").write_text(json.dumps(golden, indent=1) + "\n")


# The files a user would have -----------------------------------------------------------------------------------------


def make_model():
    """A GPT-2 in which every tensor matters: biases and norms are random too, logits are of order 1."""
    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=101, n_positions=40, initializer_range=0.2,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=100, eos_token_id=100)
    model = GPT2LMHeadModel(config)
    for name, p in model.named_parameters():
        if ".ln_" in name and name.endswith("weight"):
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained("model")


def make_adapter(name, seed, **config):
    """A PEFT adapter whose B is not zero, so that A has a gradient."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, fan_in_fan_out=True, **config)
    model = get_peft_model(GPT2LMHeadModel.from_pretrained("model"), config)
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.2)
    save_adapter(model, name)


def make_batch():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 100, (n,), generator=generator).tolist() for n in LENGTHS]


def load(name, dtype):
    """The base (`base` or `full`, which trains all of it) or the base with an adapter."""
    # Eager attention is the formula as it is written; the fused kernels differ from it in rounding alone.
    model = GPT2LMHeadModel.from_pretrained("model", attn_implementation="eager")
    if name in ("adapter", "adapter_all"):
        model = PeftModel.from_pretrained(model, name, is_trainable=True)
    return model.to(dtype).train()


# Forward, loss, gradients --------------------------------------------------------------------------------------------


def logits_of(model, batch):
    """[tokens of the batch, vocab]: each sequence runs alone, so there is no padding to argue about."""
    return torch.cat([model(torch.tensor([sequence])).logits[0] for sequence in batch])


def count_targets():
    return sum(n - start for n, start in zip(LENGTHS, TARGETS_FROM))


def loss_of(logits, batch, smoothing=0.0):
    """Mean cross-entropy over all target tokens of the batch: row i of a sequence predicts its token i + 1."""
    rows, targets, first = [], [], 0
    for sequence, start in zip(batch, TARGETS_FROM):
        rows += [first + j - 1 for j in range(start, len(sequence))]
        targets += sequence[start:]
        first += len(sequence)
    assert len(targets) == count_targets()
    return F.cross_entropy(logits[rows], torch.tensor(targets), label_smoothing=smoothing)


def add_forward(name, batch, tensors, golden):
    with torch.no_grad():
        logits = logits_of(load(name, torch.float64), batch)
        single = logits_of(load(name, torch.float32), batch)
    tensors[f"logits.{name}"] = logits
    golden["loss"][name] = loss_of(logits, batch).item()
    golden["loss_smoothed"][name] = loss_of(logits, batch, SMOOTHING).item()
    golden["f32_vs_f64"][f"logits.{name}"] = relative([single], [logits])
    golden["f32_vs_f64"][f"loss.{name}"] = abs(loss_of(single, batch).item() / golden["loss"][name] - 1)


def gradients(name, dtype, batch, smoothing):
    model = load(name, dtype)
    loss_of(logits_of(model, batch), batch, smoothing).backward()
    return {n: p.grad for n, p in trainable(model).items()}


def add_gradients(name, label, batch, tensors, golden, smoothing=0.0):
    exact = gradients(name, torch.float64, batch, smoothing)
    single = gradients(name, torch.float32, batch, smoothing)
    tensors.update({f"grad.{label}.{n}": g for n, g in exact.items()})
    golden["f32_vs_f64"][f"grad.{label}"] = max(relative([single[n]], [exact[n]]) for n in exact)


# Training ------------------------------------------------------------------------------------------------------------


def train(name, dtype, batch, scheduled):
    """Ten AdamW steps on the same batch; what is recorded of a step is from before its update."""
    model = load(name, dtype)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR[name], **ADAMW)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS) if scheduled else None
    losses, lrs, norms = [], [], []
    for _ in range(STEPS):
        loss = loss_of(logits_of(model, batch), batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP if scheduled else math.inf)
        losses.append(loss.item())
        lrs.append(optimizer.param_groups[0]["lr"])
        norms.append(norm.item())
        optimizer.step()
        if schedule:
            schedule.step()
    return {"losses": losses, "lrs": lrs, "grad_norms": norms}, parameters


def add_training(name, label, batch, tensors, golden, scheduled=False):
    record, parameters = train(name, torch.float64, batch, scheduled)
    single, parameters32 = train(name, torch.float32, batch, scheduled)
    record["lr"] = LR[name]
    if scheduled:
        record |= {"schedule": "linear", "warmup": WARMUP, "clip": CLIP}
        assert min(record["grad_norms"]) < CLIP < max(record["grad_norms"]), "clipping should act in some steps only"
    golden["training"][label] = record
    golden["f32_vs_f64"][f"training.{label}.losses"] = max(
        abs(a / b - 1) for a, b in zip(single["losses"], record["losses"]))
    if name == "adapter":  # the full model's parameters would double the size of the files
        tensors.update({f"final.{label}.{n}": p.detach() for n, p in parameters.items()})
        golden["f32_vs_f64"][f"final.{label}"] = max(
            relative([parameters32[n]], [parameters[n]]) for n in parameters)


# Generation ----------------------------------------------------------------------------------------------------------

GENERATION = {
    "greedy": {"max_new_tokens": 20},
    "greedy_repetition_penalty": {"max_new_tokens": 20, "repetition_penalty": 1.3},
    "greedy_no_repeat_ngram": {"max_new_tokens": 20, "no_repeat_ngram_size": 2},
    "beam": {"max_new_tokens": 15, "num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.9,
             "no_repeat_ngram_size": 3, "early_stopping": False, "eos_token_id": BEAM_EOS},
    # No option of Transformers: its processor, shown the text without the prompt.
    "greedy_repeat_prompt": {"max_new_tokens": 20, "no_repeat_ngram_size": 2, "repeat_prompt_ngrams": True},
    "beam_repeat_prompt": {"max_new_tokens": 20, "num_beams": 4, "no_repeat_ngram_size": 2,
                           "repeat_prompt_ngrams": True},
}


class OfTextAlone(NoRepeatNGramLogitsProcessor):
    def __init__(self, size, prompt):
        super().__init__(size)
        self.prompt = prompt

    def __call__(self, ids, scores):
        return super().__call__(ids[:, self.prompt:], scores)


def generation():
    """Per setting and prompt: the new ids of each returned sequence (its end token included), best first."""
    result = {}
    for name, settings in GENERATION.items():
        outputs = [generate(prompt, settings, torch.float64) for prompt in PROMPTS]
        for prompt, output in zip(PROMPTS, outputs):
            single = generate(prompt, settings, torch.float32)
            assert single["new"] == output["new"], f"{name}: {prompt} is too close a decision to test in f32"
        result[name] = {"settings": settings, "outputs": outputs}
    ends = [new[-1] == BEAM_EOS for output in result["beam"]["outputs"] for new in output["new"][:1]]
    assert any(ends) and not all(ends), "the end token should end some of the best beams and not all"
    assert result["greedy_repeat_prompt"]["outputs"] != result["greedy_no_repeat_ngram"]["outputs"], \
        "a text should repeat what is in its prompt"
    return result


def generate(prompt, settings, dtype):
    model = load("base", dtype).eval()
    eos = settings.get("eos_token_id")
    # The model's own end token would stop the greedy runs; they have none here.
    model.generation_config.eos_token_id = eos
    ids = torch.tensor([prompt])
    settings = dict(settings)
    if settings.pop("repeat_prompt_ngrams", False):
        size = settings.pop("no_repeat_ngram_size")
        settings["logits_processor"] = LogitsProcessorList([OfTextAlone(size, len(prompt))])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=100,
                            return_dict_in_generate=True, output_scores=True, **settings)
    new = [sequence[len(prompt):].tolist() for sequence in output.sequences]
    if eos is not None:  # what follows the end is padding
        new = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in new]
    result = {"prompt": prompt, "new": new}
    if settings.get("num_beams", 1) > 1:
        result["scores"] = output.sequences_scores.tolist()
    return result


def warped_distribution():
    """What is left to sample from after temperature, top-k and top-p, in this order, at the first prompt's end."""
    settings = {"temperature": 0.7, "top_k": 12, "top_p": 0.8}
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[0]])
        logits = load("base", torch.float64).eval()(ids).logits[:, -1]
    warp = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)])
    probabilities = warp(ids, logits).softmax(-1)[0]
    kept = probabilities.nonzero().flatten().tolist()
    return {"prompt": PROMPTS[0], "settings": settings, "kept": kept, "probabilities": probabilities[kept].tolist()}


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT calls what Transformers renames
    main()
