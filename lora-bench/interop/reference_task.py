"""Fine-tunes an encoder on `text<TAB>label` lines with Transformers and PEFT, as a row of `lora compare` does, and prints
the accuracy on test lines as JSON: a control for what a method reaches.

    python reference_task.py MODEL train.tsv test.tsv --method lora --lr 3e-3 --epochs 3 --warmup 78

With `--init-adapter DIR` it writes its adapter before the first step there, leaves out dropout and shuffling, and prints the
loss of each of `--steps` steps instead: what `lora train --task sst2 --init-adapter DIR --base-dropout 0 --no-shuffle
--log FILE` has to follow.

Pinned: torch 2.15.0, transformers 5.23.0, peft 0.21.2.
"""

import argparse
import json
import random
import time

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

args = argparse.ArgumentParser()
args.add_argument("model")
args.add_argument("train")
args.add_argument("test")
args.add_argument("--method", choices=["lora", "full"], default="lora")
args.add_argument("--targets", default="query,value")
args.add_argument("--rank", type=int, default=8)
args.add_argument("--alpha", type=float, default=16)
args.add_argument("--lr", type=float, required=True)
args.add_argument("--epochs", type=int, default=3)
args.add_argument("--batch-size", type=int, default=16)
args.add_argument("--warmup", type=int, default=78)
args.add_argument("--weight-decay", type=float, default=0.01)
args.add_argument("--clip", type=float, default=1.0)
args.add_argument("--max-length", type=int, default=128)
args.add_argument("--hold-out", type=float, default=0.0, help="judge by this share of the training lines instead")
args.add_argument("--seed", type=int, default=0)
args.add_argument("--init-adapter")
args.add_argument("--steps", type=int, default=60)
args = args.parse_args()

torch.manual_seed(args.seed)
order = random.Random(args.seed)
tokenizer = AutoTokenizer.from_pretrained(args.model)


def lines(path):
    rows = [line.rstrip("\n").split("\t") for line in open(path, encoding="utf-8") if line.strip()]
    return [(text, int(label)) for text, label in rows]


def batch(rows):
    texts = tokenizer([t for t, _ in rows], padding=True, truncation=True, max_length=args.max_length, return_tensors="pt")
    return texts, torch.tensor([label for _, label in rows])


train, test = lines(args.train), lines(args.test)
if args.hold_out:
    random.Random(1).shuffle(train)
    n = round(args.hold_out * len(train))
    train, test = train[n:], train[:n]
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
if args.method == "lora":
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=args.rank, lora_alpha=args.alpha, target_modules=args.targets.split(","))
    model = get_peft_model(model, config)
trainable = [p for p in model.parameters() if p.requires_grad]
optimiser = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=args.weight_decay)
steps = args.epochs * -(-len(train) // args.batch_size)
if args.init_adapter:
    steps = args.steps
    model.save_pretrained(args.init_adapter)
factor = lambda s: s / args.warmup if s < args.warmup else (steps - s) / (steps - args.warmup)
schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: max(factor(s), 0.0))

start, model = time.time(), model.train(not args.init_adapter)
done = 0
for _ in range(args.epochs):
    if not args.init_adapter:
        order.shuffle(train)
    for i in range(0, len(train), args.batch_size):
        texts, labels = batch(train[i : i + args.batch_size])
        loss = torch.nn.functional.cross_entropy(model(**texts).logits, labels)
        if args.init_adapter:
            if done == steps:
                raise SystemExit
            done += 1
            print(json.dumps({"step": done, "loss": loss.item()}), flush=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, args.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
model.eval()
right = 0
with torch.no_grad():
    for i in range(0, len(test), 32):
        texts, labels = batch(test[i : i + 32])
        right += int((model(**texts).logits.argmax(-1) == labels).sum())
print(json.dumps({
    "accuracy": right / len(test),
    "trainable": sum(p.numel() for p in trainable),
    "seconds": round(time.time() - start, 1),
    **{k: getattr(args, k) for k in ("method", "targets", "lr", "epochs", "seed")},
}))
