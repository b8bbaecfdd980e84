"""The other side of the report of the CPU: what a user of PyTorch, Transformers and PEFT gets on the same work.

    python peer_cpu.py '{"kind": "train", "model": DIR, ...}'

The argument is the description that this project's side gets too (`Work` in `src/cpu/work.rs`), and whether AdamW is
PyTorch's fused one. The model has the shape
of the folder's config.json and random weights, without any dropout. Prints one JSON object as its last line.

Pinned: torch 2.15.0, transformers 5.23.0, peft 0.21.2.
"""

import json
import os
import re
import resource
import statistics
import sys
import time

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

IGNORED = -100  # the label that the loss of Transformers leaves out


def main():
    work = json.loads(sys.argv[1])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    result = {"train": train, "generate": generate, "forward": forward}[work["kind"]](work)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(json.dumps(dict(result, peak_rss_mib=round(peak_memory_mib(), 1), versions=versions)))


def peak_memory_mib():
    """As the other side reads it: what `getrusage` tells begins with the memory of the program that started this one."""
    try:
        with open("/proc/self/status") as status:
            return int(re.search(r"VmHWM:\s*(\d+) kB", status.read())[1]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def config_of(work):
    config = AutoConfig.from_pretrained(work["model"])
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob",
                "attention_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return config


def is_encoder(config):
    return config.model_type in ("bert", "roberta")


def with_lora(model, config, work):
    task = {"task_type": "SEQ_CLS" if is_encoder(config) else "CAUSAL_LM"} if work["kind"] == "train" else {}
    return get_peft_model(model, LoraConfig(r=work["rank"], lora_alpha=work["alpha"], target_modules=work["targets"],
                                            lora_dropout=0.0, fan_in_fan_out=config.model_type == "gpt2", **task))


def train(work):
    """Steps of training; the first is not counted."""
    config = config_of(work)
    kind = AutoModelForSequenceClassification if is_encoder(config) else AutoModelForCausalLM
    model = kind.from_config(config)
    if work["method"] == "lora":
        model = with_lora(model, config, work)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4,
                                  fused=work.get("fused", False))
    seconds, tokens, begun = [], [], 0.0
    for batch in line_batches(work) if work["lines"] else random_batches(work, config):
        begun = time.process_time() if len(seconds) == 1 else begun
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=work["dtype"] == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - start)
        tokens.append(int(batch["attention_mask"].sum()))
    busy = time.process_time() - begun
    return {
        "cores": busy / sum(seconds[1:]),
        "tokens_per_s": sum(tokens[1:]) / sum(seconds[1:]),
        "step_s": statistics.median(seconds[1:]),
        "tokens_per_step": sum(tokens[1:]) / len(tokens[1:]),
        "loss": loss.item(),
    }


def random_batches(work, config):
    """The same random tokens at every step: all of them predicted, or a label for each sequence."""
    g = torch.Generator().manual_seed(1)
    shape = (work["batch"], work["tokens"])
    ids = torch.randint(2, config.vocab_size, shape, generator=g)
    labels = torch.randint(0, 2, shape[:1], generator=g) if is_encoder(config) else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [batch] * work["steps"]


def line_batches(work):
    """`context||reference` lines in their order, padded to the longest of the batch, with the loss on the reference."""
    from reference_e2e import collate, read_examples
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(os.path.join(work["lines"]["tokenizer"], "tokenizer.json"))
    examples = read_examples(work["lines"]["data"], tokenizer, 512, work["batch"] * work["steps"])
    for first in range(0, len(examples), work["batch"]):
        yield collate(examples[first:first + work["batch"]])


def generate(work):
    """Continuations of random prompts, none of which ends early; the first, short one warms up."""
    config = config_of(work)
    model = AutoModelForCausalLM.from_config(config).eval()
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, config.vocab_size, (work["batch"], work["tokens"]), generator=g)

    def run(new):
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=work["dtype"] == "bf16"):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                                 do_sample=False, num_beams=work["beams"], pad_token_id=0)
        assert out.shape[1] == work["tokens"] + new, out.shape
        return time.perf_counter() - start

    run(min(4, work["new"]))
    begun = time.process_time()
    seconds = [run(work["new"]) for _ in range(work["steps"])]
    return {
        "tokens_per_s": work["batch"] * work["new"] / statistics.median(seconds),
        "cores": (time.process_time() - begun) / sum(seconds),
        "seconds": seconds,
    }


def forward(work):
    """Forward passes without the head: base, LoRA beside it and merged into it, in turn."""
    config = config_of(work)
    lora = lambda: with_lora(AutoModel.from_config(config), config, work)
    models = {"base": AutoModel.from_config(config).eval(), "lora": lora().eval(),
              "lora, merged": lora().merge_and_unload().eval()}
    ids = torch.randint(2, config.vocab_size, (work["batch"], work["tokens"]))
    seconds = {name: [] for name in models}
    names = list(models)
    with torch.no_grad():
        for round in range(work["steps"] + 1):
            for name in names[round % 3:] + names[:round % 3]:
                start = time.perf_counter()
                models[name](ids)
                if round:
                    seconds[name].append(time.perf_counter() - start)
    ratio = lambda name: statistics.median(a / b for a, b in zip(seconds[name], seconds["base"]))
    return {"ms": {n: 1e3 * statistics.median(s) for n, s in seconds.items()}, "ratio": {n: ratio(n) for n in names}}


if __name__ == "__main__":
    main()
