"""The paper's formulas the plain way: file after file, three scales, whitening, a search, loops over k, τ, queries.

python by_hand.py ROOT WEIGHTS
"""

import json
import sys
from pathlib import Path

import faiss
import numpy as np
import timm
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.functional import normalize, to_tensor

ROOT, WEIGHTS = map(Path, sys.argv[1:])
KS, TAUS = (1, 2, 3, 5, 7, 10, 15, 20, 50), (0.01, 0.1, 1, 5, 10, 15, 20, 25, 30, 50, 100, 500)
model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(WEIGHTS), num_classes=0).eval()


def describe(path: str) -> np.ndarray:
    """GeM of each scale, summed."""
    image = normalize(to_tensor(Image.open(ROOT / "images" / path).convert("RGB")), [0.5] * 3, [0.5] * 3)[None]
    total = torch.zeros(1)
    for scale in (1.0, 2**-0.5, 0.5):
        scaled = image if scale == 1 else F.interpolate(image, scale_factor=scale, mode="bilinear")
        pooled = model.forward_features(scaled).clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)
        total = total + F.normalize(pooled)[0]
    return F.normalize(total, dim=0).numpy()


def answer(neighbours: np.ndarray, similarities: np.ndarray, k: int, tau: float) -> tuple[int, float]:
    """The best exhibit of one query, and the logarithm of its confidence."""
    best: dict[int, float] = {}
    for row, similarity in zip(neighbours[:k], similarities[:k], strict=True):
        best[ids[row]] = max(best.get(ids[row], -1.0), float(similarity))
    label = min(best, key=lambda exhibit: (-best[exhibit], exhibit))
    odds = [tau * (s - best[label]) for exhibit, s in best.items() if exhibit != label]
    odds += [-tau * best[label]] * (len(set(ids)) - len(best))
    return label, -np.log1p(np.exp(odds).sum())


def gap(split: str, k: int, tau: float) -> float:
    """Precision at each right answer, surest first, over the number of queries that show an exhibit."""
    answers = [answer(*query, k, tau) for query in zip(*found[split], strict=True)]
    right, total = 0, 0.0
    for i, q in enumerate(np.argsort([-confidence for _, confidence in answers], kind="stable"), 1):
        if answers[q][0] == truth[split][q]:
            right += 1
            total += right / i
    return total / sum(exhibit is not None for exhibit in truth[split])


parts = {"database": "MET_database", "val": "valset", "test": "testset"}
entries = {part: json.loads((ROOT / f"ground_truth/{name}.json").read_text()) for part, name in parts.items()}
ids = [entry["id"] for entry in entries["database"]]
truth = {split: [entry.get("MET_id") for entry in entries[split]] for split in ("val", "test")}
with torch.inference_mode():
    descriptors = {part: np.stack([describe(entry["path"]) for entry in entries[part]]) for part in parts}

mean = descriptors["database"].mean(axis=0, dtype=np.float64)
values, vectors = np.linalg.eigh(np.cov(descriptors["database"].T, bias=True))
chosen = np.argsort(-values)[: min(512, len(ids) - 1)]
for part, rows in descriptors.items():
    whitened = (rows - mean) @ vectors[:, chosen] / np.sqrt(values[chosen])
    descriptors[part] = (whitened / np.linalg.norm(whitened, axis=1, keepdims=True)).astype(np.float32)

index = faiss.IndexFlatIP(descriptors["database"].shape[1])
index.add(descriptors["database"])
found = {split: index.search(descriptors[split], min(50, len(ids)))[::-1] for split in truth}
k, tau = max(((k, tau) for k in KS for tau in TAUS), key=lambda point: gap("val", *point))
figures: dict[str, dict[str, float]] = {}
for split, exhibits in truth.items():
    labels = [answer(*query, k, tau)[0] for query in zip(*found[split], strict=True)]
    met = [label == exhibit for label, exhibit in zip(labels, exhibits, strict=True) if exhibit is not None]
    nearest = [ids[row] == exhibit for (row, *_), exhibit in zip(found[split][0], exhibits, strict=True)]
    figures[split] = {"gap": gap(split, k, tau), "acc": sum(met) / len(met), "recall@1": sum(nearest) / len(met)}
print(json.dumps(figures))
