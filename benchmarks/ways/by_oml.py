"""The way of open-metric-learning: its data set, its inference, its retrieval and its metrics.

python by_oml.py ROOT WEIGHTS
"""

import json
import sys
from pathlib import Path

import pandas as pd
import timm
import torch
from oml.datasets import ImageQueryGalleryLabeledDataset
from oml.inference import inference
from oml.interfaces.models import IExtractor
from oml.metrics import calc_retrieval_metrics_rr
from oml.retrieval import RetrievalResults
from oml.transforms.images.torchvision import get_normalisation_resize_torch
from torch.nn import functional as F

SIZE, RANKS, BATCH, WORKERS = 512, (1, 5, 10), 4, 2


class Extractor(IExtractor):
    """The network with GeM."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(weights), num_classes=0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Unit descriptors."""
        return F.normalize(self.model.forward_features(images).clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3))

    @property
    def feat_dim(self) -> int:
        """Their width."""
        return self.model.num_features


def main(root: Path, weights: Path) -> None:
    """Describe, search, count."""
    rows = []
    for split, name in {"database": "MET_database", "val": "valset", "test": "testset"}.items():
        for entry in json.loads((root / f"ground_truth/{name}.json").read_text()):
            label = entry.get("id", entry.get("MET_id", -1))
            rows.append(
                (f"images/{entry['path']}", label, "validation", split != "database", split == "database", split)
            )
    table = pd.DataFrame(rows, columns=["path", "label", "split", "is_query", "is_gallery", "part"])
    transform = get_normalisation_resize_torch(SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = ImageQueryGalleryLabeledDataset(table, dataset_root=root, transform=transform)
    descriptors = inference(Extractor(weights).eval(), images, batch_size=BATCH, num_workers=WORKERS)
    retrieved = RetrievalResults.from_embeddings(descriptors, images, n_items=max(RANKS))
    each = calc_retrieval_metrics_rr(
        retrieved, cmc_top_k=RANKS, precision_top_k=(), map_top_k=(), reduce=False, verbose=False
    )
    queries = table[table.is_query].reset_index()
    figures = {}
    for split in ("val", "test"):
        is_met = torch.tensor(((queries.part == split) & (queries.label != -1)).to_numpy())
        figures[split] = {f"recall@{n}": float(each["cmc"][n][is_met].mean()) for n in RANKS}
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
