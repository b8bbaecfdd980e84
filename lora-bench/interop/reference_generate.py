"""Greedy continuations by Transformers: the tokens that `lora generate` has to produce one by one.

    python lora-bench/interop/reference_generate.py --model DIR [--adapter DIR] --prompt TEXT --context CONTEXT

Needs torch, transformers and (with --adapter) peft. A prompt is encoded as it is; a context as in training, trimmed and
followed by the end-of-text token. Both options may be repeated. Prints one JSON array with an object per prompt:
`prompt_ids`, the new `ids` and their `text`, and `smallest_gap`, the least distance between the two largest logits of
any step: where it is near the rounding of f32, another order of additions may rightly pick the other token.
"""

import argparse
import json
import os

import torch
from tokenizers import Tokenizer

from reference_e2e import END_OF_TEXT, encode_context, load_base


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_file(os.path.join(args.tokenizer or args.model, "tokenizer.json"))
    model = load_base(args.model)
    if args.adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    eos = tokenizer.token_to_id(END_OF_TEXT)
    results = []
    for kind, text in args.texts or []:
        prompt = encode_context(tokenizer, text) if kind == "context" else tokenizer.encode(text).ids
        ids, gap = greedy(model, prompt, args.max_new_tokens, eos)
        results.append({kind: text, "prompt_ids": prompt, "ids": ids, "text": tokenizer.decode(ids), "smallest_gap": gap})
    print(json.dumps(results, ensure_ascii=False, indent=1))


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="folder of the base model")
    p.add_argument("--adapter", help="folder of a PEFT adapter")
    p.add_argument("--tokenizer", help="folder with tokenizer.json; default: the model's")
    text = lambda kind: lambda value: (kind, value)
    p.add_argument("--prompt", dest="texts", action="append", type=text("prompt"), help="plain text to continue")
    p.add_argument("--context", dest="texts", action="append", type=text("context"), help="left side of a data line")
    p.add_argument("--max-new-tokens", type=int, default=40, help="end-of-text stops earlier")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    return p.parse_args()


def greedy(model, prompt, max_new_tokens, eos):
    """The new ids and the smallest gap between the best and the second best logit."""
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=eos,
                            return_dict_in_generate=True, output_logits=True)
    best = torch.cat(output.logits).topk(2).values
    return output.sequences[0, len(prompt):].tolist(), (best[:, 0] - best[:, 1]).min().item()


if __name__ == "__main__":
    main()
