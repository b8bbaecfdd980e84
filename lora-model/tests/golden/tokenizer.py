"""Writes the ids that GPT-2's own tokenizer gives the texts of tokenizer.json, next to this script.

    pip install tokenizers==0.23.3
    python lora-model/tests/golden/tokenizer.py FOLDER_OF_GPT2    # with its tokenizer.json

The texts are the ones of `tests/tokenizer.rs`, which checks that they are the same.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

FILE = Path(__file__).resolve().parent / "tokenizer.json"


def main():
    tokenizer = Tokenizer.from_file(str(Path(sys.argv[1]) / "tokenizer.json"))
    texts = [case["text"] for case in json.loads(FILE.read_text())]
    cases = [{"text": text, "ids": tokenizer.encode(text).ids} for text in texts]
    FILE.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
