"""Writes metrics.json: predictions, truth, and what scikit-learn and SciPy make of them.

    pip install scikit-learn==1.9.1 scipy==1.17.1 && python make.py
"""

import json
import random
from pathlib import Path

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

rng = random.Random(7)


def labels(n, kinds, right):
    truth = [rng.randrange(kinds) for _ in range(n)]
    predicted = [t if rng.random() < right else rng.randrange(kinds) for t in truth]
    return predicted, truth


def values(n, digits, noise):
    truth = [round(rng.uniform(0, 5), digits) for _ in range(n)]
    return [round(t + rng.gauss(0, noise), digits) for t in truth], truth


cases = {"labels": [], "values": []}
for n, kinds, right in [(200, 2, 0.8), (57, 2, 0.3), (300, 3, 0.6), (90, 5, 0.1)]:
    predicted, truth = labels(n, kinds, right)
    cases["labels"].append((predicted, truth))
# Where something is not defined, or almost.
cases["labels"] += [([0] * 6, [0, 1, 0, 1, 1, 0]), ([1, 0, 1], [1, 1, 1]), ([0, 0], [0, 0]), ([0, 1, 1], [1, 0, 0])]
# Few digits have many ties.
for n, digits, noise in [(150, 6, 1.0), (120, 1, 0.5), (80, 0, 2.0)]:
    cases["values"].append(values(n, digits, noise))
cases["values"] += [([1.0, 2.0, 3.0], [-1.0, -2.0, -9.0]), ([1e-9, 2e-9, 4e-9, 3e-9], [1e9, 1e9 + 1, 1e9 + 3, 1e9 + 2])]

out = {"labels": [], "values": []}
for predicted, truth in cases["labels"]:
    case = {"predicted": predicted, "truth": truth, "accuracy": float(accuracy_score(truth, predicted))}
    case["matthews"] = float(matthews_corrcoef(truth, predicted))
    # Label 1 against the others.
    ones = [[int(x == 1) for x in of] for of in (truth, predicted)]
    case["f1"] = float(f1_score(*ones, zero_division=0.0))
    out["labels"].append(case)
for predicted, truth in cases["values"]:
    case = {"predicted": predicted, "truth": truth}
    case["pearson"] = float(pearsonr(predicted, truth)[0])
    case["spearman"] = float(spearmanr(predicted, truth)[0])
    out["values"].append(case)
lines = [f'"{kind}": [\n' + ",\n".join(json.dumps(c) for c in of) + "\n]" for kind, of in out.items()]
Path(__file__).with_name("metrics.json").write_text("{" + ",\n".join(lines) + "}\n")
