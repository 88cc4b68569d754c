"""Instance-level recognition of artworks: which exhibit a photo shows, and how sure that is.

The README tells how to use the commands. The modules, along the way of the data:

- **All at once**: `metilr.evaluation`, from photographs to GAP; `metilr.index` and `metilr.identify`, from a folder of
  images to answers; `metilr.rerun`, `metilr.compare`, `metilr.sweep`.
- **From images to descriptors on disk**: `metilr.data.ground_truth`, `metilr.data.transforms`, `metilr.data.batching`,
  `metilr.models.backbones`, `metilr.models.pooling`, `metilr.models.embedder`, `metilr.extraction`,
  `metilr.descriptors`, `metilr.reference_format`.
- **From descriptors to figures**, on NumPy arrays that need not come from images: `metilr.whitening`,
  `metilr.fit_whitening`, `metilr.search`, `metilr.approximate_search`, `metilr.sharded_search`, `metilr.knn`,
  `metilr.metrics`, `metilr.metrics.open_set`, `metilr.intervals`; the whole of it: `metilr.recognition`.
- **Beyond the published recipe**: `metilr.method`, `metilr.searchable`, `metilr.geometric_check`, `metilr.geometry`.
- **Training**: `metilr.data.pairs`, `metilr.data.augmentations`, `metilr.data.visits`, `metilr.losses`,
  `metilr.training`.
- **Photos of visitors**: `metilr.photos`, `metilr.collections_on_disk`, `metilr.collection`, `metilr.threshold`,
  `metilr.serve`.
- **What a run left**: `metilr.runs`, `metilr.report`.

Everywhere ``N`` counts database images or rows, ``Q`` queries, ``D`` dimensions, ``B`` items of a batch; images are
``(3, H, W)``, height before width, in px. Descriptors are float32 rows of unit length, figures lie in [0, 1]. What a
caller's file, option or data makes impossible raises `metilr.errors.UserError`, one line that names it and the remedy.
"""

__version__ = "0.1.0"
