"""Writes text.json: what a small model says of records, with references, and what published programs make of it.

    cargo build --release -p lora-train --bin lora --example demo_data
    pip install sacrebleu==2.6.0 nltk==3.10.4 pycocoevalcap==1.2 && python text.py ../../../target/release

The model is trained for a few minutes, so that it is often wrong. Without the folder of the binaries, its texts stay as
they are and are scored again.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from nltk.stem.snowball import SnowballStemmer
from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import corpus_nist
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a


class NoSynonyms:
    def synsets(self, word):
        return []


split_13a = Tokenizer13a()
stemmer = SnowballStemmer("english")


def words(text):
    return split_13a(text.lower().rstrip()).split()


def scores(predictions, references):
    columns = list(itertools.zip_longest(*references))
    bleu = BLEU(lowercase=True)
    out = {"bleu": bleu.corpus_score(predictions, columns).score}
    p, r = [words(p) for p in predictions], [[words(r) for r in rs] for rs in references]
    # It divides by zero when no prediction has n words.
    longest = min(5, max(map(len, p)))
    out["nist"] = corpus_nist(r, p, n=longest) if longest > 0 else 0.0
    each = [meteor_score(rs, p, stemmer=stemmer, wordnet=NoSynonyms()) for rs, p in zip(r, p)]
    out["meteor_exact_stem"] = sum(each) / len(each)
    r = {i: [" ".join(x) for x in rs] for i, rs in enumerate(r)}
    p = {i: [" ".join(x)] for i, x in enumerate(p)}
    out["rouge_l"] = float(Rouge().compute_score(r, p)[0])
    out["cider"] = float(Cider().compute_score(r, p)[0])
    return out, str(bleu.get_signature())


def model_texts(binaries):
    with tempfile.TemporaryDirectory() as folder:
        run = lambda *a: subprocess.run([*a, "-q"] if a[0] == lora else a, cwd=folder, check=True)
        lora = binaries / "lora"
        run(binaries / "examples" / "demo_data", ".")
        run(lora, "pretrain", *"--text prose.txt --out base --vocab 1024 --layers 2 --dim 128 --heads 4 --context 192"
            " --steps 500 --batch-size 16 --lr 3e-3 --warmup 100".split())
        run(lora, "train", *"--model base --data train.txt --out adapter --targets c_attn,attn.c_proj,c_fc,mlp.c_proj"
            " --steps 200 --lr 5e-3 --warmup 10 --clip 1".split())
        run(lora, "eval", *"--model base --adapter adapter --task e2e --data test.txt --num-beams 4"
            " --predictions said.txt".split())
        read = lambda name: (Path(folder) / name).read_text(encoding="utf-8").splitlines()
        pairs = [line.split("||", 1) for line in read("test.txt")]
        references = [[text for _, text in group] for _, group in itertools.groupby(pairs, key=lambda p: p[0])]
        return read("said.txt"), references


# Where something is empty, odd, or not defined.
ODD = [
    ([""], [["a mill stands here ."]]),
    (["", "a mill stands here ."], [["there is a mill ."], ["a mill stands here .", "here stands a mill ."]]),
    (["mill"], [["mill"]]),
    (["mill"], [["a mill", "the old mill of the town"]]),
    (["The Mill is a pub near the river ."], [["The Mill is a pub near the river ."]]),
    (
        ["The Mill is a pub near the river .", "The Vaults serves Velmish food ."],
        [["The Mill is a pub near the river ."], ["The Vaults serves Velmish food ."]],
    ),
    (["nothing of it is so"], [["Velmish cooking, that one knows"]]),
    (["one two three four", "five six"], [["seven eight nine ten eleven"], ["twelve", "thirteen fourteen"]]),
    (["it welcomed the children kindly", "guests loves walking"], [["it welcomes a child , kind"], ["a guest loved walks"]]),
    (["the the the the the the", "a a b b a a"], [["the cat is on the mat", "there is a cat"], ["a b a b", "b a"]]),
    (["a b c d e f g h", "c d"], [["a b x c d y e f", "g h a b c"], ["c d e", "c d f g h i"]]),
    (["ÉTOILE NAÏVE, Straße: 20-25 €", "ΟΔΟΣ ΣΟΦΙΑΣ"], [["étoile naïve , strasse : 20 - 25 €"], ["οδος σοφιας", "ὁδός"]]),
    (["It's 3.5 stars (of 5), £20-25; \"good\"!", "A.B. said: 1,000 well-known"], [["it's 3,5 stars of 5 . 20 - 25"], ["a . b . said 1,000 well known"]]),
    (["x", "y z"], [["x", "", "x x"], ["", "y"]]),
    (["", "y"], [["", "a"], ["<skipped>", "-"]]),
    (["a b c d e f"], [["a b c d e f g h", "a b c d"]]),
]
ODD_WORDS = [
    "", " ", "\u00a0 a\u2003b\x1fc ", "a.b 1.5 a.5 5.a .5 5. ... a..b ,.,", "1,000 a,b ,a a, 5,", "20-25 a-b -5 5- 5--6",
    "&quot;a&quot; &amp;lt; &LT;b&gt; &amp;amp;", "a-\nb\nc <skipped>d", "it's o'clock 'a' “b” ‘c’ b's!", "[x]{y}(z)|^_`~@#$%&*+=<>?/\\:;\"",
    "İstanbul ΣΟΦΟΣ ǅ ﬀ 你好。好", "a\u200bb \ufeffc d\u0301", "٣.٤ ½.5",
]

file = Path(__file__).with_name("text.json")
if len(sys.argv) > 1:
    said, references = model_texts(Path(sys.argv[1]).resolve())
else:
    texts = json.loads(file.read_text(encoding="utf-8"))["texts"]
    said, references = [t[0] for t in texts], [t[1:] for t in texts]
parts = [(0, len(said), 99), (0, len(said), 1)] + [(i, i + 20, 99) for i in range(0, len(said), 20)]
out = {"parts": [], "odd": []}
for start, end, most in parts:
    part, out["signature"] = scores(said[start:end], [r[:most] for r in references[start:end]])
    out["parts"].append({"from": start, "to": end, "references": most} | part)
for p, r in ODD:
    out["odd"].append({"predictions": p, "references": r} | scores(p, r)[0])
out["words"] = [[text, words(text)] for text in ODD_WORDS]
out["texts"] = [[p, *r] for p, r in zip(said, references)]
dump = lambda value: json.dumps(value, ensure_ascii=False)
signature = dump(out.pop("signature"))
rows = [f'"{key}": [\n' + ",\n".join(map(dump, of)) + "\n]" for key, of in out.items()]
file.write_text("{" + f'"signature": {signature},\n' + ",\n".join(rows) + "}\n", encoding="utf-8")
