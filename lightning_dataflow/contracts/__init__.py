"""The records that parts exchange. Standard library only: importing this never imports torch."""

from lightning_dataflow.contracts.errors import (
    BrokenFeaturesError,
    CapacityError,
    CaptureMismatchError,
    NotFiniteError,
    PeerFailedError,
    PeerGoneError,
    PeerTimeoutError,
    UnknownNameError,
    UserError,
)
from lightning_dataflow.contracts.guard import assert_no_tensors
from lightning_dataflow.contracts.log import LogRecord
from lightning_dataflow.contracts.records import (
    SCHEMA_VERSION,
    CaptureSpec,
    FeatureHandle,
    FeatureSpec,
    PromptTask,
    SampleOrigin,
    SampleRef,
    StepContext,
)
from lightning_dataflow.contracts.validation import ref_from_json, ref_to_json

__all__ = [
    "SCHEMA_VERSION",
    "BrokenFeaturesError",
    "CapacityError",
    "CaptureMismatchError",
    "CaptureSpec",
    "FeatureHandle",
    "FeatureSpec",
    "LogRecord",
    "NotFiniteError",
    "PeerFailedError",
    "PeerGoneError",
    "PeerTimeoutError",
    "PromptTask",
    "SampleOrigin",
    "SampleRef",
    "StepContext",
    "UnknownNameError",
    "UserError",
    "assert_no_tensors",
    "ref_from_json",
    "ref_to_json",
]
