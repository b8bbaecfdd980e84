"""LoRA on `context||reference` lines with PEFT: the losses that `lora train` has to follow step by step.

    python lora-bench/interop/reference_e2e.py --model DIR --data train.txt --init-adapter INIT > peft.jsonl
    lora train --model DIR --data train.txt --init-adapter INIT --out OUT --no-shuffle --steps 20 --log lora.jsonl

Needs torch, transformers and peft. The initial adapter is made if the folder does not exist: random A and, so that all
gradients matter from the first step on, a small random B. Prints one JSON object per step, `{"step", "loss"}`, with the
loss from before the step's update; steps count from 1. The lines are taken in the order of the file, from the start
again after the last one. Everything is f32 and without dropout.
"""

import argparse
import json
import os
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import (AutoModelForCausalLM, get_constant_schedule_with_warmup, get_linear_schedule_with_warmup)

END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # the label that the loss of Transformers leaves out


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_file(os.path.join(args.tokenizer or args.model, "tokenizer.json"))
    examples = read_examples(args.data, tokenizer, args.max_length)
    if not os.path.exists(args.init_adapter):
        make_adapter(args.model, args.init_adapter, args.seed)
    model = PeftModel.from_pretrained(load_base(args.model), args.init_adapter, is_trainable=True)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    if args.schedule == "linear":
        schedule = get_linear_schedule_with_warmup(optimizer, args.warmup, args.steps)
    else:
        schedule = get_constant_schedule_with_warmup(optimizer, args.warmup)
    for step in range(args.steps):
        first = step * args.batch_size
        batch = [examples[i % len(examples)] for i in range(first, first + args.batch_size)]
        # The mean over all targets of the batch, whatever their sequence.
        loss = model(**collate(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(json.dumps({"step": step + 1, "loss": loss.item()}), flush=True)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="folder of the base model")
    p.add_argument("--tokenizer", help="folder with tokenizer.json; default: the model's")
    p.add_argument("--data", required=True, help="file of `context||reference` lines")
    p.add_argument("--init-adapter", required=True, help="folder of the adapter to start from; made if it is not there")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--lr", type=float, default=2e-4)
    p.add_argument("--weight-decay", type=float, default=0.01)
    p.add_argument("--schedule", choices=("constant", "linear"), default="constant")
    p.add_argument("--warmup", type=int, default=0, help="steps over which the learning rate rises from 0")
    p.add_argument("--max-length", type=int, default=512, help="longer sequences are cut")
    p.add_argument("--seed", type=int, default=0, help="of a new initial adapter")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    return p.parse_args()


def load_base(folder):
    """The model in f32 with every dropout of its config off."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **off)


def make_adapter(base, folder, seed):
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, lora_dropout=0.0, target_modules=["c_attn"],
                        fan_in_fan_out=True)
    model = get_peft_model(load_base(base), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    model.save_pretrained(folder)


def encode_context(tokenizer, context):
    """BPE(context) and the end-of-text token. The context is trimmed; microsoft/LoRA trims only the line it stands in,
    so that a space before `||` would stay, but the E2E data has none."""
    return tokenizer.encode(context.strip()).ids + [tokenizer.token_to_id(END_OF_TEXT)]


def read_examples(path, tokenizer, max_length, most=None):
    """Per line (ids, labels): the context carries no loss, the reference and its end-of-text do. At most `most` of them."""
    examples = []
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            context, separator, reference = line.partition("||")
            if not separator:
                sys.exit(f"{path}:{number}: no `||` in this line")
            context = encode_context(tokenizer, context)
            reference = tokenizer.encode(" " + reference.strip()).ids + [tokenizer.token_to_id(END_OF_TEXT)]
            labels = [IGNORED] * len(context) + reference
            examples.append(((context + reference)[:max_length], labels[:max_length]))
            if len(examples) == most:
                break
    return examples


def collate(examples):
    """Padding on the right, which a causal model's real tokens do not see."""
    longest = max(len(ids) for ids, _ in examples)
    padded = lambda rows, fill: torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
    return {
        "input_ids": padded([ids for ids, _ in examples], 0),
        "attention_mask": padded([[1] * len(ids) for ids, _ in examples], 0),
        "labels": padded([labels for _, labels in examples], IGNORED),
    }


if __name__ == "__main__":
    main()
