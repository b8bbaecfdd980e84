"""Loads adapters that this project trained and saved into PEFT, and compares logits, for the whole matrix of models and
methods in lora-model/tests/golden/peft.

    LORA_INTEROP=DIR cargo test -p lora-model --test it -- --ignored adapters_for_peft_to_read
    python lora-bench/interop/check_adapters.py DIR    # torch, transformers and peft as golden/make.py says

Fails where logits differ by more than 1e-5 of their norm, where PEFT warns of anything, and where names and shapes in the
file are not those that PEFT would save of what it loaded (`peft_names.py`).
"""

import json
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent.parent / "lora-model" / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft_matrix import MODELS, forward  # noqa: E402
from common import check_versions, relative  # noqa: E402
from peft_names import differences  # noqa: E402


def main(folder):
    check_versions()
    transformers.utils.logging.disable_progress_bar()
    checked, failed = 0, 0
    for name, (cls, *_) in MODELS.items():
        data = json.loads((GOLDEN / "peft" / f"{name}.json").read_text())
        for variant in data["variants"]:
            adapter = Path(folder, name, variant)
            base = getattr(transformers, cls).from_pretrained(GOLDEN / name / "model", attn_implementation="eager")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = peft.PeftModel.from_pretrained(base, adapter).eval()
            problems = [str(w.message) for w in caught if issubclass(w.category, (UserWarning, RuntimeWarning))]
            # It says so of every normalisation, of embeddings that are the output head's matrix, of every VeRA without its
            # matrices, and of every AdaLoRA whose budget was cut, with its own files too.
            usual = ("Unsupported layer type", "Specified to not ", "Model has `tie_word_embeddings", "Model with `tie_word_embeddings")
            usual += ("The following rank_pattern keys did not match any",) * variant.startswith("adalora")
            problems = [p for p in problems if not p.startswith(usual)] + differences(model, adapter)
            with torch.no_grad():
                theirs = [forward(model, data, i)[0] for i in range(len(data["sequences"]))]
            ours = torch.tensor(json.loads((adapter / "logits.json").read_text()))
            error = relative([torch.cat(theirs).flatten()], [ours])
            checked += 1
            if problems or not error <= 1e-5:
                failed += 1
            print(f"{name} {variant}: {error:.1e}" + "".join(f"\n  {p}" for p in problems))
    print(f"{checked} adapters, {failed} failed")
    sys.exit(1 if failed or not checked else 0)


if __name__ == "__main__":
    main(sys.argv[1])
