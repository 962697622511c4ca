"""Use of trained models: captions, answers, labels, conversations and search."""

from frozenprefix.inference.caption_audit import AuditedCaption, audit_captions
from frozenprefix.inference.captioner import Caption, Captioner, Generation
from frozenprefix.inference.classifier import Classification, Classifier
from frozenprefix.inference.dialog import Dialog
from frozenprefix.inference.embedding import Embedder
from frozenprefix.inference.evidence import EvidenceScorer, WordEvidence
from frozenprefix.inference.few_shot import Episode, Shot, choose_answers, write_answers
from frozenprefix.inference.image_index import Hit, ImageIndex, index_folder, open_index
from frozenprefix.inference.likelihood import likeliest, likeliest_of_groups, log_likelihoods, token_log_likelihoods
from frozenprefix.inference.stream import RollingCaption, StreamCaptioner
from frozenprefix.inference.streaming import stream_pieces, stream_text
from frozenprefix.inference.supported import SupportedCaption, SupportedCaptioner
from frozenprefix.inference.video import Clip, Frame, SceneDetector, Segment, VideoCaptioner
from frozenprefix.inference.zero_shot import LabelledImage, ZeroShotClassifier

__all__ = [
    "AuditedCaption",
    "Caption",
    "Captioner",
    "Classification",
    "Classifier",
    "Clip",
    "Dialog",
    "Embedder",
    "Episode",
    "EvidenceScorer",
    "Frame",
    "Generation",
    "Hit",
    "ImageIndex",
    "LabelledImage",
    "RollingCaption",
    "SceneDetector",
    "Segment",
    "Shot",
    "StreamCaptioner",
    "SupportedCaption",
    "SupportedCaptioner",
    "VideoCaptioner",
    "WordEvidence",
    "ZeroShotClassifier",
    "audit_captions",
    "choose_answers",
    "index_folder",
    "likeliest",
    "likeliest_of_groups",
    "log_likelihoods",
    "open_index",
    "stream_pieces",
    "stream_text",
    "token_log_likelihoods",
    "write_answers",
]
