"""Data: samples and the sources that they come from, images, the feature cache, collation.

Example:
    >>> from frozenprefix.data import load_source
    >>> len(load_source({"type": "captions", "path": str(data_folder)}))
    12
"""

from typing import TYPE_CHECKING

from frozenprefix.registry import lazy_exports

if TYPE_CHECKING:
    from frozenprefix.data.cache import FeatureCache
    from frozenprefix.data.cache_writer import FeatureCacheWriter, encode_images
    from frozenprefix.data.caption_retriever import CaptionRetriever
    from frozenprefix.data.check import check_samples
    from frozenprefix.data.collation import Collator, StepDataset
    from frozenprefix.data.images import BadImages, find_images, load_image, to_image
    from frozenprefix.data.retrieval_options import RetrievalOptions
    from frozenprefix.data.samplers import ImageStream
    from frozenprefix.data.samples import ImageGroup, Sample, group_by_images
    from frozenprefix.data.sources import SourceConfig, detect_sources, load_source, load_sources, open_source
    from frozenprefix.data.sources.objects import source_from

__all__ = [
    "BadImages",
    "CaptionRetriever",
    "Collator",
    "FeatureCache",
    "FeatureCacheWriter",
    "ImageGroup",
    "ImageStream",
    "RetrievalOptions",
    "Sample",
    "SourceConfig",
    "StepDataset",
    "check_samples",
    "detect_sources",
    "encode_images",
    "find_images",
    "group_by_images",
    "load_image",
    "load_source",
    "load_sources",
    "open_source",
    "source_from",
    "to_image",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "cache": ("FeatureCache",),
        "cache_writer": ("FeatureCacheWriter", "encode_images"),
        "caption_retriever": ("CaptionRetriever",),
        "retrieval_options": ("RetrievalOptions",),
        "check": ("check_samples",),
        "collation": ("Collator", "StepDataset"),
        "images": ("BadImages", "find_images", "load_image", "to_image"),
        "samplers": ("ImageStream",),
        "samples": ("ImageGroup", "Sample", "group_by_images"),
        "sources": ("SourceConfig", "detect_sources", "load_source", "load_sources", "open_source"),
        "sources.objects": ("source_from",),
    },
)
