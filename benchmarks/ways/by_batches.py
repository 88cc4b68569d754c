"""The way of VPR-methods-evaluation: all images resized to one size, batches, one array, FAISS, recalls.

Its batches: several database images at once, queries one by one. The network, its weights and the pooling are a
user's; what says which database images are right for a query is the exhibit in place of coordinates.

python by_batches.py ROOT WEIGHTS
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
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

SIZE, RANKS, BATCH, WORKERS = (512, 512), (1, 5, 10), 4, 2


class Images(Dataset):
    """Database and queries in one row, as tensors of one size."""

    def __init__(self, root: Path) -> None:
        self.root, self.paths, self.exhibits, self.splits = root, [], [], []
        for split, name in {"database": "MET_database", "val": "valset", "test": "testset"}.items():
            for entry in json.loads((root / f"ground_truth/{name}.json").read_text()):
                self.paths.append(entry["path"])
                self.exhibits.append(entry.get("id", entry.get("MET_id", -1)))
                self.splits.append(split)
        steps = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3), transforms.Resize(SIZE)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(self.root / "images" / self.paths[i]).convert("RGB")), i


def main(root: Path, weights: Path) -> None:
    """Describe, search, count."""
    model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(weights), num_classes=0).eval()
    images = Images(root)
    exhibits, splits = np.array(images.exhibits), np.array(images.splits)
    descriptors = np.empty((len(images), model.num_features), dtype=np.float32)
    with torch.inference_mode():
        for rows, batch_size in (
            (np.flatnonzero(splits == "database"), BATCH),
            (np.flatnonzero(splits != "database"), 1),
        ):
            for batch, indices in DataLoader(Subset(images, rows.tolist()), batch_size, num_workers=WORKERS):
                pooled = model.forward_features(batch).clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)
                descriptors[indices.numpy()] = F.normalize(pooled).numpy()
    index = faiss.IndexFlatL2(descriptors.shape[1])
    index.add(descriptors[splits == "database"])
    figures = {}
    for split in ("val", "test"):
        is_met = (splits == split) & (exhibits != -1)
        _, neighbours = index.search(descriptors[splits == split], min(max(RANKS), index.ntotal))
        is_right = exhibits[neighbours[exhibits[splits == split] != -1]] == exhibits[is_met][:, None]
        figures[split] = {f"recall@{n}": float(is_right[:, :n].any(axis=1).mean()) for n in RANKS}
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
